"""What the study would cost this site's patients in privacy, and whether that protects anybody."""

from medfl.check.finding import Finding
from medfl.check.scope import Scope
from medfl.errors import MedflError
from medfl.privacy.accounting import UNIT, WEAK, Spent, spent
from medfl.privacy.forecast import forecast
from medfl.privacy.ledger import Ledger, shown
from medfl.workshop import new_method

SITES = 3  # taken where a lone training takes the steps of all: an invitation does not say how many they are


def findings(scope: Scope, patients: int) -> list[Finding]:
    """
    Args:
        patients: of this site's training images.
    """
    privacy = scope.study.privacy
    if not privacy.on:
        what = "The study has no differential privacy: updates are limited in size, not in what they say of a patient."
        return [Finding("budget", "privacy", "pass", what, counts={"patients": patients})]
    if not patients:
        return []
    books = bool(new_method(scope.study).codebooks())
    delta = privacy.delta or 1 / (10 * patients)
    try:
        before = Ledger.of(scope.site.state, scope.site.site).releases()
    except MedflError as error:
        return [Finding("budget", "ledger", "fail", str(error), "Without it nothing may be released.", "", {})]
    total = spent([*before, *forecast(scope.study, patients, sites=SITES, books=books)], delta)
    return [_verdict(total, privacy.max_epsilon, patients, spent_before=bool(before))]


def _verdict(total: Spent, most: float | None, patients: int, *, spent_before: bool) -> Finding:
    earlier = ", with what was spent before" if spent_before else ""
    what = (
        f"the whole study would cost ε={shown(total.epsilon)} at δ={total.delta:.1e} with {patients} training "
        f"patients{earlier} (unit: {UNIT})"
    )
    counts = {"patients": patients, "delta": total.delta, "epsilon": round(min(total.epsilon, 1e6), 2)}
    if most is not None and total.epsilon > most:
        why = f"policy.privacy or the study stops this site's part at ε={most:g}, before the study ends."
        fix = "Ask the study lead for more noise (privacy.noise), or fewer rounds and arms."
        return Finding("budget", "epsilon", "warn", what, why, fix, counts)
    if total.epsilon > WEAK:
        why = f"Above ε={WEAK:g} this is no protection worth the name: do not call it one."
        fix = "More patients, more noise (privacy.noise), or fewer rounds and arms."
        return Finding("budget", "epsilon", "warn", what, why, fix, counts)
    return Finding("budget", "epsilon", "pass", what, counts=counts)
