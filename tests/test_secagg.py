"""Sums under masks: right whoever drops out, and nothing of one site for the server, however it asks."""

import base64
import itertools
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl import config
from medfl.carriers import FIRST_NODE
from medfl.errors import ConfigError, CredentialError, DivergedError, NetworkError, PolicyError
from medfl.layout import Layout
from medfl.messages import Broadcast
from medfl.secagg import layouts, masks, shamir
from medfl.secagg.fixed import Scale
from medfl.secagg.hiding import Hiding, scale_of
from medfl.secagg.roster import Entry, Roster, Ticket
from medfl.secagg.session import Session
from tests.federation.masked import SOME, STEPS, SUMS, WEIGHTS, Sites, sites_of
from tests.federation.small import small_study

LINEAGE = "0" * 32


# ---- secret sharing


def plain_value(points: list[tuple[int, int]], at: int) -> int:
    """The polynomial through some points, at a place: Neville's scheme, term by term."""
    values = [y for _, y in points]
    for width in range(1, len(points)):
        for i in range(len(points) - width):
            low, high = points[i][0], points[i + width][0]
            top = (at - high) * values[i] + (low - at) * values[i + 1]
            values[i] = top * pow(low - high, -1, shamir.PRIME) % shamir.PRIME
    return values[0] % shamir.PRIME


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_shares_are_points_of_one_polynomial_whose_value_at_0_is_the_secret(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold, secret = data.draw(st.integers(1, count)), data.draw(st.binary(min_size=32, max_size=32))
    shares = shamir.split(secret, count, threshold)
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    points = [(place, int.from_bytes(shares[place - 1])) for place in chosen]
    assert shamir.join({place: shares[place - 1] for place in chosen}) == secret
    assert plain_value(points, 0) == int.from_bytes(secret)
    for place in range(1, count + 1):
        assert plain_value(points, place) == int.from_bytes(shares[place - 1])


def test_too_few_shares_fit_any_secret_and_give_none() -> None:
    shares = shamir.split(bytes(32), 8, 6)
    for few in itertools.combinations(range(1, 9), 5):
        with pytest.raises(ValueError, match="too few"):
            shamir.join({place: shares[place - 1] for place in few})
    other = [(0, 12345), *((place, int.from_bytes(shares[place - 1])) for place in range(1, 6))]
    made = {place: plain_value(other, place).to_bytes(shamir.BYTES) for place in range(1, 7)}
    assert int.from_bytes(shamir.join(made)) == 12345  # five true shares and a sixth that makes another secret of them


# ---- fixed point


@pytest.mark.parametrize(("dtype", "limit", "sites"), [("float32", 8.0, 1), ("float64", 1e11, 16)])
def test_the_largest_sums_do_not_wrap_and_are_precise(dtype: str, limit: float, sites: int) -> None:
    scale = Scale.of(dtype, limit, limit * sites, "secagg.x")
    values = np.array([limit, -limit, 0.0, 1.25, 2.0**-scale.power], dtype)
    total = np.zeros(5, scale.dtype)
    for _ in range(sites):
        part = np.empty(5, scale.dtype)
        scale.encode(values, part)
        total += part
    np.testing.assert_allclose(scale.decode(total), sites * values.astype(np.float64), rtol=2**-53, atol=0)
    wrong = total + np.array(1 << (8 * total.itemsize - 2), scale.dtype)
    with pytest.raises(ValueError, match="mask is left"):
        scale.decode(wrong)


@pytest.mark.parametrize(
    ("value", "error"), [(8.01, ConfigError), (-1e30, ConfigError), (np.nan, DivergedError), (np.inf, DivergedError)]
)
def test_a_value_beyond_the_range_is_an_error_and_never_wraps(value: float, error: type[Exception]) -> None:
    scale = Scale.of("float32", 8.0, 8.0, "secagg.update_range")
    with pytest.raises(error, match="secagg.update_range=8" if error is ConfigError else "lr"):
        scale.encode(np.array([0.0, value], np.float32), np.empty(2, np.uint32))
    with pytest.raises(ConfigError, match="Lower it"):
        Scale.of("float32", 1e9, 1e9, "secagg.update_range")


# ---- masks


@pytest.mark.parametrize("size", [5, 70_000, 300_000])
def test_masks_cancel_and_look_the_same_whatever_they_hide(size: int) -> None:
    seed = masks.derived(b"seed", b"context", "test")
    images = []
    for value in (0, 123_456_789):
        total = np.full(size, value, np.uint32)
        masks.add(total, seed, "group", sign=1)
        images.append(total.copy())
        masks.add(total, seed, "group", sign=-1)
        assert (total == value).all()
    other = np.zeros(size, np.uint32)
    masks.add(other, seed, "another group", sign=1)
    assert not (images[0] == other).any()


def chi_square(array: np.ndarray) -> float:
    """Of the bytes against equal frequencies, 255 degrees of freedom; above 377 in one of 10^6 random arrays."""
    seen = np.bincount(np.frombuffer(array.tobytes(), np.uint8), minlength=256)
    expected = array.nbytes / 256
    return float(((seen - expected) ** 2 / expected).sum())


def test_a_masked_answer_is_uniform_and_independent_of_its_values(tmp_path: Path) -> None:
    seen = []
    for name, change in {"zeros": 0.0, "large": 7.5}.items():
        sites = sites_of(tmp_path / name, count=5, size=200_000)
        sites.values[0] = sites.values[0] | {WEIGHTS: sites.before[WEIGHTS] + np.float32(change)}
        sites.values[0][SUMS] = np.full_like(sites.values[0][SUMS], 1e10 * change)
        sites.summed()
        reply = next(r for step, site, r in sites.grid.received if (step, site) == ("pretrain", 0))
        assert set(reply.content.array_records) == {"masked"}
        arrays = {k: np.frombuffer(a.data, a.dtype) for k, a in reply.content.array_records["masked"].items()}
        assert all(chi_square(array) < 377 for array in arrays.values())
        seen.append(arrays["all/uint32"].astype(np.float64))
    assert chi_square(sites.values[0][WEIGHTS]) > 1e6  # what is hidden is far from uniform
    assert abs(np.corrcoef(*seen)[0, 1]) < 5 / np.sqrt(200_000)


# ---- whole sums, and who drops out of them


def check_sum(sites: Sites, present: set[int]) -> None:
    found, wanted = sites.summed().flat, sites.expected(present)
    assert found.keys() == wanted.keys()
    for group, values in wanted.items():
        scale, count = scale_of(group, sites.study.secagg, len(sites.values)), len(present)
        bound = count * 2.0 ** -(scale.power + 1) / (0.5 if group in (WEIGHTS, SOME) else 1.0)
        rounding = np.abs(values) * float(np.finfo(found[group].dtype).eps)
        assert (np.abs(found[group] - values) <= bound + rounding).all(), group


@pytest.mark.parametrize("gone", [(), (7,), (0, 5)])
@pytest.mark.parametrize("step", STEPS)
def test_the_sum_is_the_plain_one_whoever_drops_out_and_when(step: str, gone: tuple[int, ...], tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    sites.grid.lost = {(step, site) for site in gone}
    if step == "keys":  # weights are fixed over those on the roster
        sites.enrolled = [site for at, site in enumerate(sites.enrolled) if at not in gone]
    check_sum(sites, set(range(8)) - (set() if step == "unmask" else set(gone)))
    left = list(Path(sites.study.state_dir).rglob("sum.json"))
    assert len(left) == (0 if step == "keys" else len(gone))  # of those who dropped out, until the next sum


def test_drop_outs_at_every_step_of_one_sum(tmp_path: Path) -> None:
    sites = sites_of(tmp_path, count=12)
    sites.grid.lost = {("shares", 0), ("pretrain", 1), ("unmask", 2)}
    check_sum(sites, set(range(2, 12)))


@pytest.mark.parametrize("step", STEPS[1:])
def test_below_the_threshold_the_round_fails_and_nothing_is_revealed(step: str, tmp_path: Path) -> None:
    sites = sites_of(tmp_path)
    sites.grid.lost = {(step, site) for site in (0, 3, 6)}  # 5 are left, 6 needed
    with pytest.raises(NetworkError, match=r"5 of 8 sites are left of the sum.* ask for 6. Nothing was revealed"):
        sites.summed()
    assert sum(kind == "unmask" for kind, *_ in sites.grid.received) == (5 if step == "unmask" else 0)


def test_a_part_that_too_few_sites_own_is_refused(tmp_path: Path) -> None:
    sites = sites_of(tmp_path, count=5)
    sites.grid.lost = {("pretrain", 4)}
    with pytest.raises(PolicyError, match=r"modality:t1.*: a sum over 2 sites, secagg.least asks for 3"):
        sites.summed()
    assert not [1 for step, *_ in sites.grid.received if step == "unmask"]
    with pytest.raises(PolicyError, match="a sum over 2 sites"):
        sites_of(tmp_path / "few", count=4).summed()


# ---- what a site refuses


class Table:
    """Four sites by hand, up to any step."""

    def __init__(self, folder: Path, count: int = 4, lineage: str = LINEAGE) -> None:
        self.settings = small_study(folder / "run", "arms=[federated]", "secagg.active=true").secagg
        self.answers = layouts.masked(sites_of(folder / "s", count=8).layout.owned(()))
        self.names = [f"site-{at}" for at in range(count)]
        self.folders = {name: folder / lineage / name for name in self.names}
        self.ticket = Ticket("session-1", "pretrain", lineage, 1)

    def begin(self, **changes: Any) -> Roster:
        self.sessions = {name: Session.begin(self.folders[name], name, self.ticket) for name in self.names}
        return self.roster(**changes)

    def roster(self, **changes: Any) -> Roster:
        share = {WEIGHTS: 1 / len(self.names)}
        return Roster(
            self.ticket,
            {
                n: Entry(base64.b64encode(s.public).decode(), "", (), changes.get(n, share))
                for n, s in self.sessions.items()
            },
        )

    def load(self, name: str) -> Session:
        return Session.load(self.folders[name], name, self.ticket.session)

    def share(self, roster: Roster) -> dict[str, dict[str, bytes]]:
        return {name: self.load(name).share(roster, self.settings, (), 0.5) for name in self.names}

    def receive(self, name: str, sealed: dict[str, dict[str, bytes]], broadcast: str = "a") -> Hiding:
        return self.load(name).receive(sealed, self.answers, self.settings, broadcast=broadcast)

    def reveal(self, name: str, alive: list[str], gone: list[str]) -> dict[str, bytes]:
        return self.load(name).reveal(alive, gone, self.answers, self.settings)


def test_a_site_never_gives_both_shares_of_another(tmp_path: Path) -> None:
    table = Table(tmp_path)
    sealed = table.share(table.begin())
    table.receive("site-0", sealed)
    with pytest.raises(PolicyError, match="other sites than those"):
        table.reveal("site-0", table.names, ["site-3"])  # both at once
    given_ = table.reveal("site-0", table.names[:3], ["site-3"])
    assert sorted(given_) == ["key of site-3", "mask of site-0", "mask of site-1", "mask of site-2"]
    with pytest.raises(PolicyError, match="over or was never begun"):
        table.reveal("site-0", table.names, [])  # and then the other one
    assert not list(table.folders["site-0"].glob("*sum.json"))


def test_what_a_site_keeps_of_a_sum_is_for_it_alone(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.share(table.begin())
    for folder in table.folders.values():
        files = list(folder.iterdir())
        assert [path.name for path in files] == ["sum.json"]
        assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_a_round_repeated_with_other_sites_or_weights_is_not_summed(tmp_path: Path) -> None:
    """Else the difference of the two sums would be one site's update."""
    table, names = Table(tmp_path), [f"site-{at}" for at in range(4)]
    table.receive("site-0", table.share(table.begin()))
    table.reveal("site-0", names, [])
    other: dict[str, dict[str, float]] = {"site-1": {WEIGHTS: 0.1}}
    for alive, changes in ((names[:3], {}), (names, other)):
        table.receive("site-0", table.share(table.begin(**changes)))
        with pytest.raises(PolicyError, match=r"site-3 was given before, and is asked for over .* other weights"):
            table.reveal("site-0", alive, sorted(set(names) - set(alive)))
    table.receive("site-0", table.share(table.begin()))
    assert table.reveal("site-0", names, [])


def cut(sealed: dict[str, dict[str, bytes]]) -> None:
    del sealed["site-2"], sealed["site-3"]


def tamper(sealed: dict[str, dict[str, bytes]]) -> None:
    text = bytearray(sealed["site-1"]["site-0"])
    text[40] ^= 1
    sealed["site-1"]["site-0"] = bytes(text)


def swap(sealed: dict[str, dict[str, bytes]]) -> None:
    sealed["site-1"]["site-0"] = sealed["site-1"]["site-2"]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (cut, PolicyError, "a sum over 2 of 4 sites, need 3"),
        (tamper, CredentialError, "site-1.* of another site or round, or was changed"),
        (swap, CredentialError, "site-1.* of another site or round, or was changed"),
        (lambda sealed: sealed.pop("site-0"), PolicyError, "goes on without it"),
    ],
)
def test_a_site_refuses_few_peers_and_foreign_shares(
    change: Callable[[Any], None], error: type[Exception], match: str, tmp_path: Path
) -> None:
    table = Table(tmp_path)
    sealed = table.share(table.begin())
    change(sealed)
    with pytest.raises(error, match=match):
        table.receive("site-0", sealed)


def test_a_site_refuses_what_was_of_another_round_and_a_second_answer(tmp_path: Path) -> None:
    table = Table(tmp_path)
    old = table.share(table.begin())
    sealed = table.share(table.begin())
    with pytest.raises(CredentialError, match="of another site or round"):
        table.receive("site-0", sealed | {"site-1": old["site-1"]})  # a share that was replayed
    table.receive("site-0", sealed)
    with pytest.raises(
        PolicyError, match="a second request to mask"
    ):  # two answers under one mask show their difference
        table.receive("site-0", sealed)
    with pytest.raises(PolicyError, match="a second list"):
        table.share(table.roster())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"site-0": {WEIGHTS: 0.97}}, "beyond rounds.max_share"),
        ({"site-1": {WEIGHTS: -0.1}}, "beyond rounds.max_share"),
        ({"site-1": {WEIGHTS: float("nan")}}, "beyond rounds.max_share"),
        ({f"site-{at}": {WEIGHTS: 0.5 if at == 0 else 1e-12} for at in range(4)}, "beyond rounds.max_share"),
    ],
)
def test_a_site_refuses_weights_that_let_one_stand_out(changes: Any, match: str, tmp_path: Path) -> None:
    table = Table(tmp_path)
    with pytest.raises(PolicyError, match=match):
        table.share(table.begin(**changes))


def test_a_site_refuses_a_mean_that_drop_outs_would_leave_to_one(tmp_path: Path) -> None:
    table = Table(tmp_path)
    heavy = {f"site-{at}": {WEIGHTS: 0.49 if at < 2 else 0.01} for at in range(4)}
    sealed = table.share(table.begin(**heavy))
    with pytest.raises(PolicyError, match="one would be 96% of the mean, more than 75%"):
        table.receive("site-0", {name: parts for name, parts in sealed.items() if name != "site-1"})


def test_sites_that_got_another_broadcast_have_masks_that_do_not_cancel(tmp_path: Path) -> None:
    """Else all but one could be sent weights that nothing moves from (Pasquini et al., CCS 2022)."""
    table = Table(tmp_path)
    sealed = table.share(table.begin())
    seeds = {name: table.receive(name, sealed, "b" if name == "site-0" else "a").seeds for name in table.names}
    for one, other in itertools.combinations(table.names, 2):
        assert (seeds[one][other] == seeds[other][one]) == ("site-0" not in (one, other))
    sites = sites_of(tmp_path / "lying", count=5)
    honest = sites.grid.deliver

    def deliver(message: Message) -> Message:
        if message.metadata.message_type.endswith("pretrain") and message.metadata.dst_node_id == FIRST_NODE:
            broadcast = Broadcast.from_record(message.content)
            other = {group: array + 1 for group, array in broadcast.flat.items()}
            message.content = Broadcast(broadcast.order, other).to_record()
        return honest(message)

    sites.grid.deliver = deliver  # type: ignore[method-assign]
    with pytest.raises(NetworkError, match="mask is left"):
        sites.summed()


@pytest.mark.parametrize("count", range(3, 40))
def test_no_lists_of_drop_outs_unmask_a_site(count: int, tmp_path: Path) -> None:
    """A site masks with c peers that it was told of. If `needed` sites give its mask, among them 2 needed - count that
    were told of these peers too, and the others their keys, it is bare; c would have to be that many, and few enough
    that the others are `needed`.
    """
    need = small_study(tmp_path, "arms=[federated]", "secagg.active=true").secagg.needed(count)
    assert not [c for c in range(count) if 2 * need - count <= c <= count - 1 - need]


def test_a_site_refuses_two_or_one_under_several_names_or_without_it(tmp_path: Path) -> None:
    table = Table(tmp_path)
    whole = table.begin()
    twice = dict(whole.sites) | {"site-3": whole.sites["site-2"]}
    few = {name: whole.sites[name] for name in table.names[:2]}
    foreign = dict(whole.sites) | {"site-0": whole.sites["site-1"]}
    session = table.load("site-0")
    for sites, match in ((twice, "have one key"), (few, "a sum over 2 sites"), (foreign, "with other keys")):
        with pytest.raises(PolicyError, match=match):
            session.share(Roster(table.ticket, sites), table.settings, (), 0.5)


def test_a_site_takes_no_request_for_a_single_update(tmp_path: Path) -> None:
    """The plain request of a study without secure aggregation gets an error, at whatever time."""
    sites = sites_of(tmp_path, count=5)
    with pytest.raises(PolicyError, match="0 of 5 sites gave a usable reply"):
        sites.plain()
    assert all(reply.has_error() for *_, reply in sites.grid.received)


def test_peers_that_did_not_sign_their_keys_are_not_added_to(tmp_path: Path) -> None:
    table = Table(tmp_path)
    roster = table.begin()
    with pytest.raises(CredentialError, match=r"site-1.* not signed by a key of policy.peers"):
        roster.check_signed("site-0", {"site-1": "AAAA"})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ticket": {}, "sites": {"a": {"keys": "?"}}}', "null"])
def test_a_list_of_sites_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="no list of the sites"):
        Roster.read(text)
    whole = {"ticket": {"session": "s", "kind": "k", "lineage": "l", "round": 1}, "sites": {}}
    assert Roster.read(json.dumps(whole)).sites == {}


# ---- what cannot be had together


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("rule=trimmed_mean", "the rule trimmed_mean needs the update of each site.* Take rule=weighted_mean"),
        ("rule=ldawa", "the rule layer_divergence_aware needs the update of each site"),
        ("arms=[federated,local]", r"arm 'local' is a network of one place.* Take arms=\[random,federated\]"),
        ("rule=median", "the rule median needs"),
        ("rule=multi_krum", "the rule krum needs"),
        ("rule=clipped_mean", "the rule clipped_mean needs"),
        ("rounds.inspect=flag", "rounds.inspect looks at .* Take rounds.inspect=none"),
        ("rounds.codebook=mean", "rounds.codebook=mean.* Take rounds.codebook=refresh"),
        ("stages=[pretrain,finetune]", r"'finetune' is a network of one place.*\[federated_finetune\]"),
        ("secagg.least=2", "secagg.least: got 2, need at least 3"),
        ("secagg.threshold=0.6", "secagg.threshold: got 0.6, need a share from 0.6666 to 1"),
    ],
)
def test_what_needs_single_updates_is_refused_by_name(override: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config.compose(["secagg.active=true", "arms=[federated]", override])
    config.compose(["secagg.active=true", "arms=[random,federated]", "rule=uniform_mean"])


def test_masked_layouts_keep_owners_and_sizes(tmp_path: Path) -> None:
    layout = sites_of(tmp_path).layout
    whole = layouts.masked(layout)
    assert {slot.name: slot.size for slot in whole.slots} == layout.sizes
    assert whole.owned(()) == layouts.masked(layout.owned(()))
    assert isinstance(whole, Layout)
    assert {slot.bytes for slot in whole.slots} == {
        size * np.dtype(group.rpartition("/")[2]).itemsize for group, size in layout.sizes.items()
    }
