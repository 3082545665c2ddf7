"""Loss, label map and confusion matrix of upsampled logits, which stock torch stores and the kernels do not."""

FAMILY = "upsample"


def test_upsample(harness, benchmark, case, implementation):
    harness.measure(benchmark, case, implementation)
