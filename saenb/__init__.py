"""A literate laboratory for sparse autoencoders and unlearning."""
from saenb.load import lazily

__version__ = "0.1.0"

__getattr__, __dir__ = lazily(__name__, {
    "saenb.lab.runner": ("run",),
    "saenb.lab.reproduction": ("reproduce",),
    "saenb.lab.presets": ("Preset",),
    "saenb.ideas.run": ("Experiment", "Run"),
    "saenb.train.mechanism": ("Mechanism",),
    "saenb.train.trainer": ("Trainer",),
    "saenb.train.config": ("TrainConfig",),
    "saenb.sae.architectures": ("Architecture",),
    "saenb.sae.sae": ("load_sae",),
    "saenb.evals.evaluation": ("Evaluation",),
    "saenb.evals.interventions.intervention": ("Intervention",),
    "saenb.evals.unlearned_models": ("unlearned",),
    "saenb.data.store": ("Store",),
    "saenb.data.harvest": ("harvest",),
    "saenb.data.world": ("World",),
})
