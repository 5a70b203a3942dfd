"""Training configurations: the typed schema, and the parser of files and command lines."""

from sit_atconv.config.command_line import config_differences, load_config, parse_command_line
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
    TeacherConfig,
    TrainingConfig,
    config_keys,
)

__all__ = [
    "AlignmentConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowConfig",
    "LogConfig",
    "MeanFlowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreviewConfig",
    "Solver",
    "TeacherConfig",
    "TrainingConfig",
    "config_differences",
    "config_keys",
    "load_config",
    "parse_command_line",
]
