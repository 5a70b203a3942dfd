"""The flow section of a configuration, from the objective to the saved model."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sit_atconv.config import FlowConfig
from sit_atconv.errors import InputError
from sit_atconv.flow import PREDICTIONS, create_interpolant, flow_matching_loss
from sit_atconv.models import SiT, create_model
from sit_atconv.training.session.objective import Objective, draw


def tiny_model(**options: object) -> SiT:
    model = create_model("SiT-S/2", 4, 1, 0, hidden_size=16, depth=1, num_heads=2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("interpolant", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_objective_trains_what_the_configuration_names(interpolant: str, prediction: str) -> None:
    config = FlowConfig(interpolant, prediction)
    if prediction in ("noise", "score"):
        config = dataclasses.replace(config, weighting="likelihood")
    model, latents = tiny_model(), torch.randn(5, 1, 4, 4)
    draws = draw(torch.arange(5), (1, 4, 4), config, seed=0)
    low, high = create_interpolant(interpolant).time_range(prediction)
    assert low <= draws.times.min() <= draws.times.max() <= high

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t)

    path = create_interpolant(interpolant)
    expected = flow_matching_loss(network, latents, draws.noise, draws.times, path, prediction, config.weighting)
    loss = Objective(model, config, None)(latents, torch.zeros(5).long(), draws, [])["loss"]
    torch.testing.assert_close(loss, expected.mean())


def test_the_prediction_travels_with_the_model(tmp_path) -> None:
    tiny_model(prediction="noise", interpolant="vp").save_pretrained(tmp_path)
    config = SiT.from_pretrained(tmp_path).config
    assert (config.prediction, config.interpolant) == ("noise", "vp")
    assert tiny_model().config.prediction == "velocity"


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (FlowConfig(weighting="velocity"), "not of velocity: use none"),
        (FlowConfig(prediction="data", weighting="likelihood"), "not of data: use none"),
        (FlowConfig("vp", times="logit-normal"), "linear and cosine"),
    ],
)
def test_losses_that_do_not_exist_are_refused_before_training(flow: FlowConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(tiny_model(), flow, None)
