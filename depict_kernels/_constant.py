"""A mark for functions whose result torch.compile takes as a constant."""

from collections.abc import Callable


def constant_in_graphs(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import the whole compiler (seconds) with this package."""
    function._dynamo_marked_constant = True
    return function
