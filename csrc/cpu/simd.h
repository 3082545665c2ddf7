// Fixed-width vectors in GCC's and clang's portable notation: one source for AVX-512, AVX2, SSE2 and NEON.
// Included by the three translation units avx512.cpp, avx2.cpp and baseline.cpp, which define DEPICT_ISA (a
// namespace) and DEPICT_LANES (floats in a vector) after selecting the instruction set. Nothing here may come
// from a header of the standard library, whose inline functions the linker would share with code for older
// processors.
#pragma once

#define DEPICT_INLINE inline __attribute__((always_inline))
#define DEPICT_UNROLL _Pragma("GCC unroll 16")

namespace depict::cpu::DEPICT_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = DEPICT_LANES;
  typedef float V __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
  typedef int32_t I __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
  typedef uint32_t U __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
};

template <>
struct Simd<double> {
  static constexpr int lanes = DEPICT_LANES / 2;
  typedef double V __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
  typedef int64_t I __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
  typedef uint64_t U __attribute__((vector_size(DEPICT_LANES * 4), may_alias));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;
template <class T>
using UVec = typename Simd<T>::U;

template <class T>
DEPICT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
DEPICT_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
DEPICT_INLINE Vec<T> load_anywhere(const T* p) {
  typedef T V __attribute__((vector_size(DEPICT_LANES * 4), aligned(sizeof(T)), may_alias));
  return *reinterpret_cast<const V*>(p);
}
template <class T>
DEPICT_INLINE void store_anywhere(T* p, Vec<T> v) {
  typedef T V __attribute__((vector_size(DEPICT_LANES * 4), aligned(sizeof(T)), may_alias));
  *reinterpret_cast<V*>(p) = v;
}
template <class T>
DEPICT_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // an addition would be done: it makes -0 of a sum 0
}

// a b + c, rounded once where the processor can. Compilers contract an expression or not as they see fit (GCC
// not from 13 on where it is all that a loop adds up), so that two sums of the same products could differ.
DEPICT_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if DEPICT_LANES == 16
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DEPICT_LANES == 8
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FMA__)  // where CXX has options such as -march=native
  return (Vec<float>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
  return a * b + c;
#endif
}
DEPICT_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if DEPICT_LANES == 16
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif DEPICT_LANES == 8
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__FMA__)
  return (Vec<double>)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
#else
  return a * b + c;
#endif
}

// A NaN in `a` survives both of these when `b` is a number.
template <class V>
DEPICT_INLINE V at_least(V a, V b) {
  return a < b ? b : a;
}
template <class V>
DEPICT_INLINE V at_most(V a, V b) {
  return a > b ? b : a;
}

// --- exp -------------------------------------------------------------------------------------------------
// exp(x) = 2^n exp(r), |r| <= ln 2 / 2. x must lie in [-87, 88] (float) or [-700, 709] (double); NaN stays
// NaN. Adding 1.5 * 2^mantissa rounds x / ln 2 and leaves n in the low bits. The float polynomial is a
// minimax fit of relative error 3e-9, the double one Taylor's to degree 13.
template <bool MinusOne>
DEPICT_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693359375f;  // nine bits: the product is exact without FMA too
  r = r - n * -2.12194440054690583e-4f;
  Vec<float> q = r * 0.00138145351715f + 0.00836874558067f;
  q = q * r + 0.0416683908883f;
  q = q * r + 0.16666520394f;
  q = q * r + 0.499999934316f;
  q = q * (r * r) + r;
  if constexpr (MinusOne) {
    const Vec<float> power = (Vec<float>)(((UVec<float>)shifted << 23) + 0x3f800000u);
    return q * power + (power - 1.0f);
  }
  return (Vec<float>)((UVec<float>)(q + 1.0f) + ((UVec<float>)shifted << 23));
}
DEPICT_INLINE Vec<float> vexp(Vec<float> x) { return exponential<false>(x); }
DEPICT_INLINE Vec<float> vexpm1(Vec<float> x) { return exponential<true>(x); }

DEPICT_INLINE Vec<double> vexp(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634074 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const Vec<double> p = (q * (r * r) + r) + 1.0;
  return (Vec<double>)((UVec<double>)p + ((UVec<double>)shifted << 52));
}

// --- log of a sum of exponentials ------------------------------------------------------------------------
// Of a positive sum of floats, held in double, in float's normal range: 2^k m with m in [sqrt(1/2), sqrt 2),
// log m = 2 atanh(s) to 2e-11, also near 1, where small losses come from. Plain arithmetic that the compiler
// vectorises over pixels.
template <class T>
DEPICT_INLINE double pixel_log(double x) {
  if constexpr (sizeof(T) == 8) return __builtin_log(x);
  const float narrow = static_cast<float>(x);
  int32_t bits;
  __builtin_memcpy(&bits, &narrow, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const int32_t power = (127 - exponent) * (1 << 23);
  float scale;
  __builtin_memcpy(&scale, &power, 4);
  const double f = x * static_cast<double>(scale) - 1.0;
  const double s = f / (2.0 + f);
  const double s2 = s * s;
  double p = 2.0 / 11.0;
  p = p * s2 + 2.0 / 9.0;
  p = p * s2 + 2.0 / 7.0;
  p = p * s2 + 2.0 / 5.0;
  p = p * s2 + 2.0 / 3.0;
  p = p * s2 + 2.0;
  return x != x ? x : exponent * 0.69314718055994530942 + p * s;
}

// --- sums and maxima across lanes --------------------------------------------------------------------------
template <int... I>
struct Sequence {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Sequence<I...> type;
};

template <class T, int... I>
DEPICT_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b, int first, Sequence<I...>) {
#if defined(__clang__)
  return first ? __builtin_shufflevector(a, b, (2 * I + 1)...) : __builtin_shufflevector(a, b, (2 * I)...);
#else
  return first ? __builtin_shuffle(a, b, IVec<T>{(2 * I + 1)...})
               : __builtin_shuffle(a, b, IVec<T>{(2 * I)...});
#endif
}

// Transposes as many vectors as they have lanes. Every step moves the lowest bit of a row's number to the top
// of the lane's and the lowest bit of a lane's to the top of the row's.
template <class T, int Steps = Simd<T>::lanes>
DEPICT_INLINE void transpose(Vec<T>* v) {
  if constexpr (Steps > 1) {
    constexpr int L = Simd<T>::lanes;
    typedef typename Count<L>::type Lanes;
    Vec<T> next[L];
    DEPICT_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      next[i] = every_second<T>(v[2 * i], v[2 * i + 1], 0, Lanes());
      next[i + L / 2] = every_second<T>(v[2 * i], v[2 * i + 1], 1, Lanes());
    }
    DEPICT_UNROLL
    for (int i = 0; i < L; ++i) v[i] = next[i];
    transpose<T, Steps / 2>(v);
  }
}

struct Add {
  template <class V>
  static DEPICT_INLINE V of(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  static DEPICT_INLINE V of(V a, V b) {
    return a < b ? b : a;
  }
};

// Reduces N vectors across their lanes to N numbers, in order, by halving pairs of vectors together.
template <class T, class Op, int N, int Width>
DEPICT_INLINE void across_lanes(Vec<T>* v) {
  if constexpr (Width > 1) {
    typedef typename Count<Simd<T>::lanes>::type Lanes;
    DEPICT_UNROLL
    for (int i = 0; i < (N + 1) / 2; ++i) {
      const Vec<T> a = v[2 * i], b = v[2 * i + 1 < N ? 2 * i + 1 : 2 * i];
      v[i] = Op::of(every_second<T>(a, b, 0, Lanes()), every_second<T>(a, b, 1, Lanes()));
    }
    across_lanes<T, Op, (N + 1) / 2, Width / 2>(v);
  }
}

template <class T>
DEPICT_INLINE Vec<double> load_wide(const T* p) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::lanes * sizeof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vec<double>);
}

template <class T>
DEPICT_INLINE void store_narrow(T* p, Vec<double> v) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::lanes * sizeof(T)), may_alias));
  *reinterpret_cast<Narrow*>(p) = __builtin_convertvector(v, Narrow);
}

template <class T>
constexpr int padded_pixels(int n) {
  return (n + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes;
}

// `out` has room for padded_pixels<T>(N).
template <class T, class Op, int N>
DEPICT_INLINE void reduce_lanes(Vec<T>* v, T* out) {
  across_lanes<T, Op, N, Simd<T>::lanes>(v);
  DEPICT_UNROLL
  for (int i = 0; i * Simd<T>::lanes < N; ++i) store<T>(out + i * Simd<T>::lanes, v[i]);
}

// The same of sums in float, with the last two halvings, which add half and a quarter of all terms, in
// double: where one term is nearly all of the sum, rounding there would drop the others, always downwards.
template <int N>
DEPICT_INLINE void sum_lanes_wide(Vec<float>* v, double* out) {
  constexpr int L = Simd<float>::lanes, D = Simd<double>::lanes;
  constexpr int kVectors = L == 16 ? (N + 3) / 4 : L == 8 ? (N + 1) / 2 : N;
  static_assert(L == 16 || L == 8 || L == 4);
  across_lanes<float, Add, N, L / 4>(v);
  alignas(64) float quarter[kVectors * L];
  DEPICT_UNROLL
  for (int i = 0; i < kVectors; ++i) store<float>(quarter + i * L, v[i]);
  Vec<double> wide[2 * kVectors];
  DEPICT_UNROLL
  for (int i = 0; i < 2 * kVectors; ++i) wide[i] = load_wide(quarter + i * D);
  across_lanes<double, Add, 2 * kVectors, 4>(wide);
  DEPICT_UNROLL
  for (int i = 0; i * D < N; ++i) store<double>(out + i * D, wide[i]);
}

}  // namespace depict::cpu::DEPICT_ISA
