"""What a site says of its data, and trains on: all images, those whose labels may be read, or synthetic ones too."""

from collections.abc import Mapping

import torch
from torch import Tensor

from medfl import site_synthesis
from medfl.data.fractions import labels_key, rows_with_labels, rows_with_masks
from medfl.data.sample import SiteData, labelled, stretch
from medfl.errors import ConfigError, DataError, PolicyError
from medfl.site_queues import patient_codes
from medfl.training import Task
from medfl.workshop import Workshop


def describe(data: SiteData, holdings: Mapping[str, int]) -> tuple[dict[str, int], dict[str, str | list[str]]]:
    """How many images it has and how many of them can teach a task, and what they are called.

    Args:
        holdings: owner group -> training images that can teach it.
    """
    train = data.train
    numbers = {
        "site/train": len(train),
        "site/val": len(data.val),
        "site/test": len(data.test),
        "site/labelled": int((train.labels >= 0).sum()),
        "site/masked": 0 if train.masks is None else int(labelled(train.masks).sum()),
        "site/regions": max((label for labels in data.regions.values() for label in labels), default=0),
    }
    facts: dict[str, str | list[str]] = {
        "held_out": "yes" if data.held_out else "no",
        "owners": ",".join(f"{group}={count}" for group, count in holdings.items()),
        "classes": list(data.exclusive),
    }
    return numbers, facts | ({"findings": list(data.findings)} if data.findings else {})


def build(shop: Workshop, data: SiteData, images: Tensor, patients: Tensor, members: Mapping[str, int]) -> Task:
    """
    Args:
        images, patients: the training images as they are resident, and their patients' codes (N,).
        members: training images by site: this one, or in a simulation's place with all data, all of them.

    Raises:
        DataError: no image has the label or mask that the method needs, or synthetic images that are not there.
        ConfigError: the method learns classes, and the images have findings, or the reverse.
    """
    train, method = data.train, shop.method
    if method.labelled or method.masked_only:
        rows = _taught(shop, data, members)
        chosen = images if len(rows) == len(images) else images[rows.to(images.device)]
        masks = None if train.masks is None else train.masks[rows]
        labels = _labels(shop, data)[rows]
        if method.labelled:
            method.check_labels(labels)
        return Task(chosen, labels, shop.views, patients[rows], masks)
    if not shop.study.training.synthetic:
        return Task(images, train.labels, shop.views, patients, train.masks)
    extra = _synthetic(shop, members)
    codes = patient_codes(tuple(f"synthetic {place}" for place in range(len(extra))))
    return Task(
        torch.cat([images, extra.to(images.device)]),
        torch.cat([train.labels, torch.full((len(extra),), -1)]),
        shop.views,
        torch.cat([patients, codes]),
    )


def _labels(shop: Workshop, data: SiteData) -> Tensor:
    """Classes (N,), or findings (N, L) for a method that learns these."""
    method, found = shop.method, data.train.findings
    if not method.labelled:
        return data.train.labels
    if method.findings and found is None:
        raise ConfigError(f"site '{data.name}': {type(method).__name__} learns findings, and there are none. "
                          "Name their columns in data.labels.")  # fmt: skip
    if found is not None and not method.findings:
        raise ConfigError(f"site '{data.name}': {type(method).__name__} learns one class for each image, and the data "
                          "have findings (data.labels). Take task=multilabel, or data.label.")  # fmt: skip
    return data.train.labels if found is None else found


def _taught(shop: Workshop, data: SiteData, members: Mapping[str, int]) -> Tensor:
    """Rows of the patients whose labels (or masks) may be read: in the place with all data, those of every site."""
    plan, masked, alone = shop.study.training, shop.method.masked_only, shop.study.privacy.on
    rows_of, found, first = rows_with_masks if masked else rows_with_labels, [], 0
    for site, count in members.items():  # in the order in which `pool` joins them
        own, key = stretch(data.train, first, count), labels_key(shop.study.seed, site)
        found.append(first + rows_of(own, plan.label_fraction, least=plan.label_least, key=key, alone=alone))
        first += count
    rows, what = torch.cat(found), "mask" if masked else "label"
    if not len(rows):
        raise DataError(f"site '{data.name}': no training image has a known {what}, so it cannot take part.")
    least = int(shop.study.sites.get("min_images", 0)) if shop.study.study_id else 0  # what policy.least_images says
    if len(rows) < least:
        raise PolicyError(
            f"site '{data.name}': {len(rows)} images would be trained on with their {what}, "
            f"policy.least_images asks for {least}. Take a larger share of them (finetune.fractions)."
        )
    return rows


def _synthetic(shop: Workshop, members: Mapping[str, int]) -> Tensor:
    """`training.synthetic` images for each real one of every member, of its own making."""
    study = shop.study
    return torch.cat(
        [
            site_synthesis.load(study.state_dir, name, round(study.training.synthetic * count))
            for name, count in members.items()
        ]
    )
