"""Training configurations: the typed schema, and the parser of files and command lines."""

from sit_atconv.config.command_line import config_differences, load_config, parse_command_line, training_command
from sit_atconv.config.images import (
    AugmentationConfig,
    ImageConfig,
    ImageOptimizerConfig,
    ImageTrainingConfig,
    NetworkConfig,
    PicturesConfig,
    ValidationConfig,
)
from sit_atconv.config.meanflow import MeanFlowConfig
from sit_atconv.config.outputs import EvaluationConfig, LogConfig, PreviewConfig
from sit_atconv.config.ranges import Solver
from sit_atconv.config.schema import (
    AlignmentConfig,
    Config,
    DataConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    Settings,
    TeacherConfig,
    TrainingConfig,
    config_keys,
)

__all__ = [
    "AlignmentConfig",
    "AugmentationConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowConfig",
    "ImageConfig",
    "ImageOptimizerConfig",
    "ImageTrainingConfig",
    "LogConfig",
    "MeanFlowConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PicturesConfig",
    "PreviewConfig",
    "Settings",
    "Solver",
    "TeacherConfig",
    "TrainingConfig",
    "ValidationConfig",
    "config_differences",
    "config_keys",
    "load_config",
    "parse_command_line",
    "training_command",
]
