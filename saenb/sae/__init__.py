"""The dictionary: a sparse autoencoder, its architectures and gates."""
from saenb.load import lazily

__getattr__, __dir__ = lazily(__name__, {
    "saenb.sae.sae": ("CONFIG", "MECHANISMS", "SAE", "SAEConfig", "WEIGHTS", "load_sae", "make_mechanism"),
})
