"""Pictures of an encoder show what they say: neighbours, what speaks for a class, and the codes of every cell."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from threadpoolctl import threadpool_limits

from medfl.config import compose
from medfl.data.sample import SiteData, Split
from medfl.evaluation import attention, code_maps, embedding, pictures
from medfl.evaluation.slices import write_png
from medfl.methods.medcss import MedCSS
from medfl.models.layers import pooled
from medfl.tasks.classification import Classification
from medfl.tasks.segmentation import Segmentation
from medfl.workshop import new_method, sites_of
from tests.shared_data import shared
from tests.test_dissect import dissect
from tests.test_encoders import encoder
from tests.test_pictures import CPU, PLAN, pixels, words

CLASSES = ("benign", "malignant")


def classifier(*, classes=2, freeze=False, **changes):
    """A linear head with weights, on an encoder that has seen images."""
    method = Classification(encoder=encoder(**changes), classes=classes, loss="cross_entropy", freeze=freeze)
    torch.nn.init.normal_(method.head.weight)
    torch.nn.init.normal_(method.head.bias)
    return method.eval()


def state_of(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def assert_untouched(method, before):
    """No tensor, gradient, mode or hook has changed."""
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not any(module.training or module._forward_hooks for module in method.modules())


def site(images=9, *, dims=2, channels=1, labels=None, classes=CLASSES, modalities=()):
    draw = torch.Generator().manual_seed(1)
    shown = torch.randn(images, channels, *[16] * dims, generator=draw)
    known = torch.arange(images) % max(1, len(classes)) if labels is None else torch.tensor(labels)
    split = Split(shown, known, tuple(f"SECRET-{n}" for n in range(images)), None)
    return SiteData("site-1", split, split, split, tuple(classes), (1.0,) * dims, "", False, modalities)


def drawn(method, data, folder, arm="federated"):
    return [path.name for path in pictures.draw(method, data, folder, CPU, arm=arm, plan=PLAN)]


# -- Grad-CAM


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("freeze", [False, True])
def test_under_a_linear_head_grad_cam_is_the_class_activation_map(dims, freeze):
    method = classifier(classes=3, freeze=freeze, spatial_dims=dims)
    images, classes = torch.randn(4, 1, *[16] * dims), torch.tensor([2, 0, 1, 2])
    got = attention.grad_cam(method.classify, method.encoder.layer4, images, classes)
    with torch.no_grad():
        maps = method.encoder.maps(images)[3]
    for image, found in enumerate(classes.tolist()):
        cam = sum(method.head.weight[found, k].item() * maps[image, k] for k in range(maps.shape[1]))  # Zhou et al.
        cells = cam.numel()
        torch.testing.assert_close(got[image] * cells, cam.clamp_min(0), rtol=1e-4, atol=1e-5)


def test_below_further_layers_grad_cam_is_the_definition():
    method, images = classifier(classes=3), torch.randn(3, 1, 16, 16)
    got = attention.grad_cam(method.classify, method.encoder.layer3, images, torch.tensor([1, 2, 0]))
    maps = method.encoder.maps(images)[2].detach().requires_grad_()
    logits = method.head(pooled(method.encoder.layer4(maps)))
    for image, found in enumerate([1, 2, 0]):
        slopes = torch.autograd.grad(logits[image, found], maps, retain_graph=True)[0][image]
        total = sum(slopes[k].mean() * maps[image, k].detach() for k in range(len(slopes)))
        torch.testing.assert_close(got[image], total.clamp_min(0), rtol=1e-4, atol=1e-7)


def test_one_logit_speaks_for_both_classes():
    method = classifier(classes=2)
    images = torch.randn(4, 1, 16, 16)
    difference = lambda images: method.classify(images).diff(dim=1)  # noqa: E731
    for found, sign in ((1, 1.0), (0, -1.0)):
        got = attention.grad_cam(difference, method.encoder.layer4, images, torch.full((4,), found))
        weights = sign * (method.head.weight[1] - method.head.weight[0])
        with torch.no_grad():
            maps = method.encoder.maps(images)[3]
            cam = torch.einsum("k,bkxy->bxy", weights, maps).relu() / maps[0, 0].numel()
        torch.testing.assert_close(got, cam, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("freeze", [False, True])
def test_looking_leaves_a_method_as_it_is(freeze):
    method = classifier(freeze=freeze)
    before = state_of(method)
    seen = attention.attention(method, torch.randn(3, 1, 16, 16))
    assert_untouched(method, before)
    assert seen.maps.shape == (3, 16, 16)
    assert not seen.maps.requires_grad


@pytest.mark.parametrize(
    ("side", "layer"), [(28, "layer3, 4×4"), (16, "layer3, 4×4"), (64, "layer3, 4×4"), (112, "layer4, 4×4")]
)
def test_the_deepest_map_that_still_says_where_is_looked_at(side, layer):
    method = classifier(image_size=side)
    assert attention.attention(method, torch.randn(1, 1, side, side)).layer == layer


def test_without_such_a_map_it_is_the_largest():
    method = classifier(stem="imagenet")  # of 16 pixels: 4, 2, 1, 1
    assert attention.attention(method, torch.randn(1, 1, 12, 12)).layer == "layer1, 3×3"


class Bright(torch.nn.Module):
    """The second class is where it is bright: the mean of a coarse map."""

    labelled = True

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.layer1 = torch.nn.AvgPool2d(4)
        self.encoder.maps = lambda images: [self.encoder.layer1(images)]

    def classify(self, images):
        return 20 * pooled(self.encoder.layer1(images)) - 0.5

    def probabilities(self, images):
        logits = self.classify(images)
        return torch.cat([-logits, logits], dim=1).sigmoid()


def test_the_map_lies_over_what_speaks_for_the_class(tmp_path):
    images = torch.zeros(2, 1, 16, 16)
    images[0, 0, 0:4, 12:16] = 1  # bright at the upper right; nothing in the second
    seen = attention.attention(Bright(), images)
    assert seen.found.tolist() == [1, 0]
    assert seen.probability.tolist() == pytest.approx([1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(-0.5))])
    assert divmod(int(seen.maps[0].argmax()), 16) in {(row, column) for row in range(4) for column in range(12, 16)}
    looks = {4: images[0] / 2, 7: images[1]}
    sheet = attention.figure(looks, {4: CLASSES[1], 7: CLASSES[1]}, seen, CLASSES, (1.0, 1.0))
    told = words(sheet)
    assert "test image 5\nfound malignant\np = 0.68\ncorrect" in told
    assert "test image 8\nfound benign\np = 0.62\nwrong: is\nmalignant" in told
    assert "nowhere" in told
    shown = pixels(write_png(sheet.figure, tmp_path / "a.png"))
    down, right = np.nonzero(shown[:, :, 0] - shown[:, :, 2] > 100)  # orange
    middle = sheet.tall / 2 + 0.25
    assert len(down)
    assert down.max() / 110 < middle
    assert right.min() / 110 > 1.1 + 1.69 + 1.65 / 2


# -- the map of features


def test_neighbours_on_the_map_are_those_of_the_features():
    features = torch.eye(3, 8).repeat_interleave(20, 0) + 0.05 * torch.randn(60, 8)
    points, note = embedding.flattened(features)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (distances.argmin(1) // 20 == np.arange(60) // 20).all()
    assert note.startswith("t-SNE, perplexity 20.")
    assert "means little" in note


def test_the_map_does_not_depend_on_the_number_of_cores():
    features = torch.randn(40, 16)
    first = embedding.flattened(features)[0]
    with threadpool_limits(2):
        assert np.array_equal(first, embedding.flattened(features)[0])


def test_a_few_images_keep_their_distances():
    angles = torch.linspace(0, 1, 6, dtype=torch.float64)
    features = torch.zeros(6, 9, dtype=torch.float64)
    features[:, 3], features[:, 7] = angles.cos(), angles.sin()
    points, note = embedding.flattened(3 * features)  # the directions count, not the lengths
    np.testing.assert_allclose(
        np.linalg.norm(points[:, None] - points[None], axis=2), torch.cdist(features, features), atol=1e-6
    )
    assert note.startswith("PCA, with 100% of the variance")


def test_equal_features_are_said_to_be_equal():
    points, note = embedding.flattened(torch.ones(60, 8) * torch.linspace(1, 2, 60)[:, None])
    assert not points.any()
    assert "the same features" in note


@pytest.mark.parametrize("features", [torch.randn(3, 8), torch.full((20, 8), math.nan)])
def test_no_map_of_too_few_images_or_of_nan(features):
    assert embedding.embedding(features, torch.zeros(len(features), dtype=torch.int64), CLASSES) is None


def test_classes_are_counted_and_named_as_they_are():
    labels = torch.tensor([0] * 7 + [1] * 4 + [-1] * 5)
    figure = embedding.embedding(torch.randn(16, 8), labels, [r"$\bad{", "_under", "unseen"])
    told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert told == [r"$\bad{ (7)", "_under (4)", "unseen (0)", "not labelled (5)"]
    assert figure.axes[0].get_title() == "Features of 16 test images"
    figure.canvas.draw()  # no formula is read into a name


def test_up_to_72_classes_look_different():
    looks = {(k % len(embedding.COLOURS), k % len(embedding.SHAPES)) for k in range(72)}
    assert len(looks) == 72


def test_a_large_site_shows_an_even_choice():
    rows = embedding.chosen(10_000)
    assert len(rows) == embedding.MOST
    assert (rows[0], rows[-1]) == (0, 9999)
    assert max(b - a for a, b in pairwise(rows)) - min(b - a for a, b in pairwise(rows)) <= 1


# -- codes


@pytest.mark.parametrize("dims", [2, 3])
def test_each_cell_shows_its_nearest_code(dims):
    method = dissect(encoder=encoder(spatial_dims=dims)).eval()
    images, before = torch.randn(5, 1, *[16] * dims), state_of(method)
    maps = code_maps.code_maps(method, images)
    assert_untouched(method, before)
    assert [code_maps.short(name) for name in maps] == ["fine", "medium", "coarse"]
    with torch.no_grad():
        layers = method.target_encoder.maps(images)
    for at, (name, codes) in enumerate(maps.items(), start=1):
        scale, layer = method.scales[code_maps.short(name)], layers[at]
        assert codes.shape == (5, *layer.shape[2:])
        corner, vectors = (0,) * (dims - 1) + (layer.shape[-1] - 1,), scale.quantizer.code_vectors()
        with torch.no_grad():
            token = scale.projection(layer)[(slice(None), slice(None), *corner)]  # (B, D)
        nearest = (torch.nn.functional.normalize(token, dim=1) @ vectors.T).argmax(1)
        assert torch.equal(codes[(slice(None), *corner)], nearest)


def test_codebooks_that_hold_nothing_are_not_shown(tmp_path):
    method = dissect(ready=False).eval()
    assert code_maps.code_maps(method, torch.randn(4, 1, 16, 16)) == {}
    assert drawn(method, site(), tmp_path) == ["embedding.png"]


def test_a_code_has_one_colour_and_like_codes_have_like_ones():
    angles = torch.tensor([0.0, 3.0, 0.2, 1.5, 2.8])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    colours = code_maps.palette(torch.tensor([[0, 1], [2, 3]]), vectors)
    assert colours.keys() == {0, 1, 2, 3}  # 4 does not occur
    assert len(set(colours.values())) == 4
    apart = {k: np.linalg.norm(np.subtract(to_rgb(colours[0]), to_rgb(colours[k]))) for k in (1, 2, 3)}
    assert apart[2] < apart[3] < apart[1]


def test_rows_tell_how_many_codes_the_whole_image_has():
    maps = {"scales.fine.quantizer": torch.tensor([[[[0, 1], [2, 2]], [[3, 3], [3, 3]]]]).movedim(1, -1)}
    vectors = {"scales.fine.quantizer": torch.randn(9, 4)}
    sheet = code_maps.figure({2: torch.rand(1, 8, 8, 8)}, maps, vectors, (1.0, 1.0, 1.0))
    assert "test image 3\nslice 5 of 8\ndifferent codes:\nfine 4" in words(sheet)
    assert "fine: 2×2×2" in words(sheet)


# -- what is drawn of whom


@pytest.mark.parametrize("dims", [2, 3])
def test_what_a_method_can_show_is_drawn_for_this_user_alone(tmp_path, dims):
    method = classifier(spatial_dims=dims)
    before = state_of(method)
    found = pictures.draw(method, site(dims=dims), tmp_path / "a", CPU, arm="finetune:random:1", plan=PLAN)
    assert [path.name for path in found] == ["embedding.png", "attention.png"]
    assert_untouched(method, before)
    folder = tmp_path / "a" / "pictures" / "site-1" / "finetune-random-1"
    assert {path.parent for path in found} == {folder}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in found)
    assert all(level.stat().st_mode & 0o777 == 0o700 for level in (folder, folder.parent, folder.parent.parent))
    assert all(b"SECRET" not in path.read_bytes() and pixels(path).std() > 10 for path in found)
    again = pictures.draw(method, site(dims=dims), tmp_path / "b", CPU, arm="x", plan=PLAN)
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in again]


def test_each_kind_of_method_has_its_pictures(tmp_path):
    methods = {
        "none": (classifier(), site(classes=(), labels=[-1] * 9), ["embedding.png"]),
        "few": (classifier(), site(2), ["attention.png"]),
        "codes": (dissect().eval(), site(), ["embedding.png", "codebook.png"]),
        "unsupervised": (medcss(), site(), ["embedding.png"]),
        "one": (dissect().eval(), site(1), []),
        "empty": (classifier(), site(0), []),
    }
    for name, (method, data, expected) in methods.items():
        assert drawn(method, data, tmp_path, name) == expected, name


def medcss():
    """It could classify, but was not built for it."""
    method = new_method(compose(["method=medcss", "data.size=16"])).eval()
    assert isinstance(method, MedCSS)
    return method


def test_a_segmenter_shows_its_labels(tmp_path):
    plain = site()
    masks = plain.test.images[:, 0].gt(0).to(torch.uint8)
    data = replace(plain, test=replace(plain.test, masks=masks), regions={"bright": (1,)})
    method = Segmentation(encoder=encoder(), labels=2, loss="dice_ce", freeze=False).eval()
    assert drawn(method, data, tmp_path) == ["embedding.png", "segmentation.png"]


def test_every_arm_looks_at_the_first_images_of_each_class(tmp_path, monkeypatch):
    shown, figure = [], attention.figure
    monkeypatch.setattr(attention, "figure", lambda looks, *rest: shown.append(list(looks)) or figure(looks, *rest))
    data = site(13, labels=[1, 1, 1, 1, 1, 1, -1, 0, 0, 0, 0, 0, 0])
    for arm in ("random", "federated"):
        drawn(classifier(), data, tmp_path, arm)
    assert shown == [[7, 8, 9, 0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("channels", "modalities", "expected"), [(1, (), 1), (3, (), 3), (3, ("flair", "t1", "t2"), 1), (2, (), 1)]
)
def test_three_channels_are_colours_unless_they_are_modalities(tmp_path, monkeypatch, channels, modalities, expected):
    seen, figure = [], attention.figure
    monkeypatch.setattr(attention, "figure", lambda looks, *rest: seen.append(looks) or figure(looks, *rest))
    drawn(classifier(in_channels=channels), site(channels=channels, modalities=modalities), tmp_path)
    for look in seen[0].values():
        assert look.shape == (expected, 16, 16)
        assert (float(look.min()), float(look.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("which", "arm", "arms", "expected"),
    [
        ("all", "random", ("random", "federated"), True),
        ("none", "federated", ("federated",), False),
        ("federated", "federated", ("random", "federated"), True),
        ("federated", "local:federated", ("local", "federated"), False),
        ("federated", "random", ("random", "federated"), False),
        ("federated", "local:site-1", ("random", "local"), True),
        ("federated", "finetune:federated:site-1:1", ("federated",), True),
        ("federated", "federated_finetune:federated:1", ("federated",), True),
        ("federated", "federated_finetune:random:1", ("federated", "random"), False),
        ("federated", "federated_finetune:federated:0.1", ("federated",), False),
        ("federated", "finetune:local:federated:1", ("federated", "local"), False),
    ],
)
def test_by_default_one_arm_is_drawn(which, arm, arms, expected):
    assert pictures.wanted(which, arm, arms) is expected


def test_real_images_are_drawn(tmp_path):
    root = shared("medmnist/breastmnist.npz").parent
    study = compose(["data=medmnist", f"data.root={root}", "data.download=false", "method=medcss_supervised"])
    data = max(sites_of(study), key=lambda one: len(one.test))
    names = drawn(new_method(study).eval(), data, tmp_path)
    assert names == ["embedding.png", "attention.png"]
    size = pixels(tmp_path / "pictures" / data.name / "federated" / "attention.png").shape
    assert size[0] > size[1] > 400  # six rows of two columns
