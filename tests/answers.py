"""Made-up benchmark questions for the tests of scoring."""

from device_bench.tasks.base import BenchQuestion, Truth


def question(family: str, truth: Truth, name: str = "1", **fields: object) -> BenchQuestion:
    """A question about which only family and truth matter."""
    plain = {"image": f"image {name}", "kind": "kind", "category": "c", "group": name, "prompt": "?"}
    return BenchQuestion(id=name, family=family, truth=truth, **{**plain, **fields})  # type: ignore[arg-type]
