"""Decoders, training steps and evaluations: what the operators' speed is worth end to end."""

from benchmarks import end_to_end

FAMILY = "decoder"


def test_decoder(harness, benchmark, case, implementation):
    harness.measure(benchmark, case, implementation)


def test_training(harness, benchmark, model):
    end_to_end.measure(harness, benchmark, model)


def test_evaluation(harness, benchmark, model):
    end_to_end.measure(harness, benchmark, model)


def test_prediction(harness, benchmark, model):
    end_to_end.measure_prediction(harness, benchmark, model)
