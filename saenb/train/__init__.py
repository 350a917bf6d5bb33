"""The training loop, and the mechanisms that plug into it."""
from saenb.load import lazily

__getattr__, __dir__ = lazily(__name__, {
    "saenb.train.config": ("TrainConfig",),
    "saenb.train.mechanism": ("Mechanism", "Step"),
    "saenb.train.trainer": ("Trainer",),
    "saenb.train.checkpoint": ("CHECKPOINT", "LOG", "read_log"),
})
