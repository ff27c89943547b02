"""The answers of the probe of a plan, from the features that the survey kept."""

from finetune.config.plan import Plan
from finetune.errors import RunError
from finetune.features.survey import Survey
from finetune.metrics.answers import ProbeAnswers

_JUDGED = ("val", "test", "calibration")


def probe_answers(seen: Survey, plan: Plan) -> ProbeAnswers | None:
    """What the probe of a plan says of val, test and calibration; None where there is none.

    Raises:
        RunError: if the plan and what was looked at disagree on a refit.
    """
    if seen.probe is None:
        return None
    final = seen.probe
    if plan.probe_on == "labelled":
        if seen.refit is None:
            raise RunError(
                "plan.yaml says probe_on labelled, but no more images are labelled than those for training: it was "
                "changed by hand. Set probe_on to train."
            )
        final = seen.refit.probe
    probes = {role: final if role == "test" else seen.probe for role in _JUDGED}
    by_role = {role: probe.logits(seen.features(role)).softmax(1).float() for role, probe in probes.items()}
    if plan.probe_on == "train" or seen.refit is None or not seen.refit.judged:
        return ProbeAnswers(by_role=by_role)
    return ProbeAnswers(by_role=by_role, out_of_fold=seen.refit.logits.double().softmax(1), rows=seen.refit.judged)
