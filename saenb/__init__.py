"""A literate laboratory for sparse autoencoders and unlearning."""
__version__ = "0.1.0"


def __getattr__(name):
    "Import what needs torch only when it is asked for, so that the command line answers at once."
    if name == "load_sae":
        from saenb.sae import load_sae
        return load_sae
    raise AttributeError(f"module 'saenb' has no attribute {name!r}")
