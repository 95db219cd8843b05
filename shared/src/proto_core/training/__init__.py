"""Training glue: staged curriculum, projection, teachers, checkpoints. Everything else is Lightning's."""

from proto_core.training.averaging import Teacher
from proto_core.training.checkpoints import WholeFileCheckpointIO, read_checkpoint, save_checkpoint
from proto_core.training.curriculum import Curriculum, ProjectionCallback, project_with_trainer
from proto_core.training.landscape import (
    GradientNormCallback,
    MESACallback,
    SAFCallback,
    SAMCallback,
)
from proto_core.training.protection import NullSpaceCallback
from proto_core.training.stages import Stage, enter_stage
from proto_core.training.storage import StoredSystem, check_label_names, load_system

__all__ = [
    "Curriculum",
    "GradientNormCallback",
    "MESACallback",
    "NullSpaceCallback",
    "ProjectionCallback",
    "SAFCallback",
    "SAMCallback",
    "Stage",
    "StoredSystem",
    "Teacher",
    "WholeFileCheckpointIO",
    "check_label_names",
    "enter_stage",
    "load_system",
    "project_with_trainer",
    "read_checkpoint",
    "save_checkpoint",
]
