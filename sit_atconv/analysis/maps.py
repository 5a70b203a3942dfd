"""Influence maps of several layers: where anchors get their output from, and what raising an anchor suppresses."""

from argparse import Namespace

import torch
from torch import Tensor

from sit_atconv.analysis.figures import draw_maps
from sit_atconv.analysis.layers import Layer, layers
from sit_atconv.analysis.measures import arrow, far, influence, suppression
from sit_atconv.analysis.subjects import Subject, open_subjects
from sit_atconv.runtime.whole_files import write_json

_PLACES = (0.25, 0.75)  # of anchors, along height and width


def routing_and_inhibition(options: Namespace) -> None:
    """Write the maps of `options.what` of every subject: numbers for each layer, and a figure."""
    opened = (options.images, options.count, options.times)
    numbers = {}
    for subject in open_subjects(options.model, *opened, options.weights, options.seed):
        chosen = _chosen(layers(subject.model, subject.run), options.layers)
        name = options.what + (f"-{subject.title.replace(' ', '')}" if subject.title else "")
        numbers[subject.title or options.model] = _measure(subject, chosen, options, name)
    write_json(options.out / f"{options.what}.json", {"model": options.model, "radius": options.radius, **numbers})


def _measure(subject: Subject, chosen: list[Layer], options: Namespace, name: str) -> dict[str, float]:
    """The mean of each layer over images and anchors: FAR, or the share of influence that is suppressed."""
    rows, totals = [], {layer.name: 0.0 for layer in chosen}
    for sample in range(options.count):
        maps, arrows = [], []
        for layer in chosen:
            found = [(anchor, _mean_map(layer, sample, anchor, options)) for anchor in _anchors(layer)]
            maps.append(sum(each for _, each in found).numpy())
            routing = options.what == "routing"
            arrows.append([(anchor, arrow(each, anchor)) for anchor, each in found] if routing else [])
            shares = [far(each, anchor, options.radius) if routing else each.sum().item() for anchor, each in found]
            totals[layer.name] += sum(shares) / len(shares) / options.count
        rows.append({"maps": maps, "arrows": arrows})
    titles = [f"{layer.name}\n{totals[layer.name]:.3f}" for layer in chosen]
    draw_maps(subject.pictures, rows, titles, options.out / f"{name}.png")
    return totals


def _mean_map(layer: Layer, sample: int, anchor: tuple[int, int], options: Namespace) -> Tensor:
    """The influence map or the suppression of one anchor, averaged over some channels: (H, W)."""
    x, operator = layer.maps[sample : sample + 1], layer.operator(sample)

    def measured(channel: int) -> Tensor:
        if options.what == "routing":
            return influence(operator, x, anchor, channel)
        return suppression(operator, x, anchor, channel, options.epsilon)

    with torch.no_grad():
        width = operator(x).shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(options.seed))[: options.channels]
    return torch.stack([measured(channel) for channel in order.tolist()]).mean(0)


def _anchors(layer: Layer) -> list[tuple[int, int]]:
    height, width = layer.maps.shape[-2:]
    return list(dict.fromkeys((int(a * height), int(b * width)) for a in _PLACES for b in _PLACES))


def _chosen(found: list[Layer], count: int) -> list[Layer]:
    """At most `count` of the layers, evenly over depth, the first and the last among them."""
    if count >= len(found):
        return found
    places = torch.linspace(0, len(found) - 1, count).round().int().tolist()
    return [found[place] for place in places]
