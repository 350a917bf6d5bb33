"""From a run to its record, and from nothing to all of them."""
from saenb.load import lazily

__getattr__, __dir__ = lazily(__name__, {
    "saenb.lab.runner": ("exam_of", "model_of", "readings_of", "run", "store_of"),
    "saenb.lab.reproduction": ("controls", "reproduce"),
    "saenb.lab.analyses": ("analyse",),
    "saenb.lab.workspace": ("committed_runs", "tiny_exam", "tiny_record", "tiny_sae", "tiny_store", "workspace"),
})
