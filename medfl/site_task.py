"""What a site trains on: all its images, those whose labels may be read, or with synthetic ones beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from medfl import site_synthesis
from medfl.data.fractions import labels_key, rows_with_labels, rows_with_masks
from medfl.data.sample import SiteData
from medfl.errors import DataError
from medfl.site_queues import patient_codes
from medfl.training import Task
from medfl.workshop import Workshop


def build(shop: Workshop, data: SiteData, images: Tensor, patients: Tensor, members: Mapping[str, int]) -> Task:
    """
    Args:
        images, patients: the training images as they are resident, and their patients' codes (N,).
        members: training images by site: this one, or in a simulation's place with all data, all of them.

    Raises:
        DataError: no image has the label or mask that the method needs, or synthetic images that are not there.
    """
    train, method = data.train, shop.method
    if method.labelled or method.masked_only:
        rows = _taught(shop, data)
        chosen = images if len(rows) == len(images) else images[rows.to(images.device)]
        masks = None if train.masks is None else train.masks[rows]
        return Task(chosen, train.labels[rows], shop.views, patients[rows], masks)
    if not shop.study.training.synthetic:
        return Task(images, train.labels, shop.views, patients, train.masks)
    extra = _synthetic(shop, members)
    codes = patient_codes(tuple(f"synthetic {place}" for place in range(len(extra))))
    return Task(
        torch.cat([images, shop.where.resident(extra)]),
        torch.cat([train.labels, torch.full((len(extra),), -1)]),
        shop.views,
        torch.cat([patients, codes]),
    )


def _taught(shop: Workshop, data: SiteData) -> Tensor:
    """Rows of the patients whose labels (or masks) may be read."""
    plan, masked = shop.study.training, shop.method.masked_only
    rows_of = rows_with_masks if masked else rows_with_labels
    key = labels_key(shop.study.seed, data.name)
    rows = rows_of(data.train, plan.label_fraction, least=plan.label_least, key=key)
    if not len(rows):
        what = "mask" if masked else "label"
        raise DataError(f"site '{data.name}': no training image has a known {what}, so it cannot take part.")
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
