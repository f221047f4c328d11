"""docs/evidence.md says of every claim what its study found, and is what the results in the repository make."""

import json
from pathlib import Path

import pytest
import yaml

from pocketvlm.evidence import DOCUMENT, HOME, Evidence, collect, document, load
from pocketvlm.pipeline import RunConfig
from vlm.errors import UserError

ROOT = Path(__file__).parents[1]
CLAIM = {"says": "It helps.", "by": "us", "study": "one", "row": "best", "at_least": 2.0}


def result(points: float, low: float, high: float = 9.0) -> dict:
    """A study.json of two rows and one pair."""
    found = {"points": points, "ci95": [points - 0.1, points + 0.1], "t_ci95": [low, high], "seeds": [points, points]}
    seeds: list[dict[str, object]] = [
        {"seed": seed, "steps": 5, "seconds": 60.0, "reports": [], "scores": {"avg": 1.0}} for seed in (0, 1)
    ]
    common = {"against": "base", "at": {}, "seeds": seeds, "mean": {"avg": 50.0}, "std": 1.0, "failures": {}}
    rows = [
        {**common, "row": "base", "difference": None, "p_holm": None},
        {**common, "row": "best", "difference": {"avg": found}, "p_holm": 0.01},
    ]
    pair = {"row": "best", "against": "base", "difference": {"avg": found}}
    return {
        "config": {"name": "one", "seeds": [0, 1], "base": "configs/tiny.yaml", "clock": "wall"},
        "split": "test",
        "readings": [{}],
        "spent": {"trainings": 4, "seconds": 7200, "evaluating_seconds": 360, "processor": "a processor"},
        "tuning": {},
        "comparisons": {"steps": rows},
        "pairs": {"steps": [pair]},
    }


def described(**claim: object) -> Evidence:
    section = {"study": "one", "title": "First", "about": "What it asks."}
    tree = {"about": "All of it.", "sections": [section], "claims": [{**CLAIM, **claim}]}
    return Evidence.parse(tree, "test")


@pytest.mark.parametrize(
    ("bound", "points", "low", "high", "verdict"),
    [
        ({"at_least": 2.0}, 2.5, 0.1, 9.0, "| confirmed |"),
        ({"at_least": 2.0}, 2.5, -0.1, 9.0, "| **not confirmed** |"),
        ({"at_least": 2.0}, 1.9, 1.0, 9.0, "| **not confirmed** |"),
        ({"at_least": 2.0}, 1.5, 1.0, 1.9, "| **refuted** |"),
        ({"at_least": None, "at_most": -2.0}, -2.5, -9.0, -0.1, "| confirmed |"),
        ({"at_least": None, "at_most": -2.0}, -1.0, -1.9, -0.1, "| **refuted** |"),
    ],
)
def test_a_claim_holds_when_difference_and_wider_interval_reach_it(
    bound: dict, points: float, low: float, high: float, verdict: str
) -> None:
    found = {"one": result(points, low, high)}
    text = document(described(**bound), found, {"a teacher": 600.0})
    assert verdict in text and f"{points:+.1f} ({low:+.1f} to {high:+.1f}; 2 seeds)" in text
    assert "4 trainings took 2.0 hours" in text and "a teacher 10 min" in text and "### Equal steps" in text
    assert verdict in document(described(**bound, against="base"), found, {})


def test_a_claim_has_one_bound() -> None:
    with pytest.raises(UserError, match="give at_least or at_most"):
        described(at_most=1.0)


def test_what_was_not_run_is_said() -> None:
    text = document(described(), {}, {})
    assert "| not measured |" in text and "Not run yet" in text and "No study has been run" in text


def test_a_claim_about_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"study one at equal steps has no row 'worst'.*only base, best"):
        document(described(row="worst"), {"one": result(2.0, 1.0)}, {})


def test_results_and_figures_are_collected_from_the_runs(tmp_path: Path) -> None:
    runs, home, figures = tmp_path / "runs", tmp_path / "home", tmp_path / "figures"
    (runs / "one").mkdir(parents=True)
    home.mkdir()
    (runs / "one" / "study.json").write_text(json.dumps(result(3.0, 1.0)))
    (runs / "one" / "curves-steps.svg").write_text("<svg/>")
    (home / "evidence.yaml").write_text(yaml.safe_dump(described().model_dump(mode="json")))
    collect(described(), runs, home, figures)
    assert "| confirmed |" in document(*load(home)) and (figures / "one-curves-steps.svg").is_file()


def test_the_document_is_what_the_results_make() -> None:
    assert (ROOT / DOCUMENT).read_text() == document(*load(ROOT / HOME))


def test_make_evidence_runs_the_documents_studies() -> None:
    makefile = (ROOT / "Makefile").read_text()
    studies = next(line for line in makefile.splitlines() if line.startswith("STUDIES = ")).split()[2:]
    assert studies == [section.study for section in load(ROOT / HOME)[0].sections]


def test_the_recommended_recipe_is_the_same_everywhere() -> None:
    """Its terms in the default's, the studies' and the second pair's file, but for K: the pair has fewer tokens."""
    files = ("tiny", "best", "transfer")
    runs = [RunConfig.load(ROOT / "configs" / f"{name}.yaml").distill for name in files]
    terms = [{name: term.model_dump(exclude={"focus_tokens"}) for name, term in run.terms.items()} for run in runs]
    assert terms[0] == terms[1] == terms[2] and len(terms[0]) == 3
