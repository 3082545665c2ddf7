class PtxError(RuntimeError):
    """What a kernel did that it may not do, or an instruction that the machine does not know."""
