"""The section on privacy: what each site has spent, by its own accounts, and what attacks found."""

from medfl.privacy.accounting import UNIT, WEAK
from medfl.report.cells import NONE, Section
from medfl.report.tables import Run, ordered_sites, study_node

NAMES = ("site/epsilon_rdp", "site/epsilon", "site/delta")


def section(run: Run) -> Section:
    """For the template; {} where the study has no differential privacy and nobody attacked it."""
    node = study_node(run, "privacy")
    if node.get("mechanism") in (None, "none"):
        return {"rows": [], "mechanism": "", "attacks": _attacks(run)} if run.audit else {}
    told = _told(run)
    rows = [(site, *_cells(told[site])) for site in ordered_sites(run) if site in told]
    worst = max((min(_bounds(one)) for one in told.values() if _bounds(one)), default=None)
    return {
        "rows": rows,
        "mechanism": node["mechanism"],
        "noise": node.get("noise"),
        "clip": node.get("clip"),
        "unit": UNIT,
        "worst": None if worst is None else f"{worst:.3g}",
        "weak": worst is not None and worst > WEAK,
        "attacks": _attacks(run),
    }


def _attacks(run: Run) -> Section:
    """What `medfl audit privacy` found; {} where it was not run."""
    audit, rows = run.audit, []
    if not audit:
        return {}
    if part := audit.get("canaries"):
        right = (
            f"95 %, {part['right']} of {part['guesses']} guesses right" if part["guesses"] else "no better than a coin"
        )
        told = f"at least {part['epsilon']:.2f} ({right})"
        name = f"ε of a {part['unit']}, from {part['canaries']} canaries in the pretraining"
        rows.append((name, told, f"at most {part['claim']:.2f} claimed, at δ={part['delta']:.1e}"))
    for name, one in audit.get("membership", {}).items():
        told = f"AUC {one['auc']:.3f}, {one['found']:.1%} found at 1 % false alarms"
        rows.append((f"Membership, by the {name}", told, "AUC 0.500, 1.0% without any knowledge"))
    for name, title in {"one_image": "one image and step", "round": "a whole round"}.items():
        if one := audit.get("inversion", {}).get(name):
            told, prior = f"SSIM {one['ssim']:.3f}", f"SSIM {one['prior']:.3f} of a typical image, without the update"
            rows.append((f"An image from the update of {title}", told, prior))
    part = audit.get("canaries")
    return {"site": audit.get("site"), "patients": audit.get("patients"), "rows": rows,
            "broken": [*audit.get("ledger", []), *(["The canaries refute the claimed ε."] if part and not part["held"]
                                                   else [])]}  # fmt: skip


def _told(run: Run) -> dict[str, dict[str, float]]:
    """Site -> name -> what its whole ledger came to when it was last told.

    The tighter accountant is told in the last round of each training alone: what a site releases after that is not
    in it, so it holds until the site tells of another round.
    """
    told: dict[str, dict[str, float]] = {}
    rounds: dict[str, tuple[str, str, int]] = {}  # of each site, the one it told of last
    for event in run.events:
        if not event.site or event.name not in NAMES:
            continue
        found, place = told.setdefault(event.site, {}), (event.stage, event.arm, event.round)
        if rounds.get(event.site) != place:
            found.pop("site/epsilon", None)
        rounds[event.site] = place
        found[event.name] = max(event.value, found.get(event.name, 0.0))
    return told


def _bounds(told: dict[str, float]) -> list[float]:
    """ε by each accountant; both bound the same releases, so the smaller one holds."""
    rdp, tight = told.get("site/epsilon_rdp"), told.get("site/epsilon")
    return [value for value in (rdp, tight) if value]


def _cells(told: dict[str, float]) -> tuple[str, str, str]:
    names = zip(NAMES, (".3g", ".3g", ".1e"), strict=True)
    return tuple(format(told[name], form) if name in told else NONE for name, form in names)  # type: ignore[return-value]
