"""Retrieval on LoCoMo's conversations by the running system, each ranked by weights that were learned
without it, beside plain dense and BM25 in the same run.

    python -m benchmarks.bench_locomo FILE

For each conversation: learn weights from the others, start the system with them, store, ask.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import Figure, write_results
from benchmarks.train_ranker import collect_all, learn, write
from memcube.client import MemCubeClient
from memcube.evaluation.locomo import load_locomo
from memcube.evaluation.runner import cpu_clock_of, run_locomo
from memcube.testing.process import SystemProcess

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "locomo" / "dev.json"


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all questions of reports over parts of them."""
    if "num_questions" in reports[0]:
        total = sum(report["num_questions"] for report in reports)
        means = {
            name: round(
                sum(r[name] * r["num_questions"] for r in reports if r["num_questions"]) / total, 2
            )
            for name in reports[0]
            if name != "num_questions"
        }
        return means | {"num_questions": total}
    keys = sorted({key for report in reports for key in report})
    return {key: merged([report[key] for report in reports if key in report]) for key in keys}


def weighted(reports: list[dict[str, Any]], field: str) -> float:
    total = sum(report["overall"]["num_questions"] for report in reports)
    return sum(report[field] * report["overall"]["num_questions"] for report in reports) / total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--json", type=Path, help="also write the report in `memcube eval`'s form")
    given = parser.parse_args()
    if not given.file.exists():
        raise SystemExit(f"{given.file} is not there; give the conversations' file")
    conversations = load_locomo(given.file)
    parts: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pools = collect_all(conversations, root / "models")
        for number, conversation in enumerate(conversations):
            others = [pool for id, pool in pools.items() if id != conversation.id]
            weights = root / f"without-{conversation.id}.json"
            write(weights, learn(others), [id for id in pools if id != conversation.id])
            data = root / f"data-{number}"
            with (
                SystemProcess(data, [f"retrieval_weights={weights}"]) as system,
                MemCubeClient(system.url, system.key) as client,
            ):
                report = run_locomo(
                    client, [conversation], suffix="bench", cpu_clock=cpu_clock_of(system.pid)
                )
            for name, figures in report.items():
                parts.setdefault(name, []).append(figures)
            print(conversation.id, json.dumps(report["memcube"]["overall"]), flush=True)
    whole = {}
    for name, reports in parts.items():
        sections = ("overall", "by_category", "without_adversarial")
        whole[name] = {section: merged([r[section] for r in reports]) for section in sections}
        whole[name]["cpu_ms_per_query"] = round(weighted(reports, "cpu_ms_per_query"), 2)
    if given.json:
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    ours, dense, bm25 = whole["memcube"], whole["dense"], whole["bm25"]
    goals = {"recall@10": ">= 80", "recall@5": ">= 71", "ndcg@10": ">= 62"}
    figures = []
    for name in ("recall@5", "recall@10", "recall@20", "mrr", "ndcg@10"):
        beside = f"BM25 {bm25['overall'][name]}, dense {dense['overall'][name]}"
        figures.append(
            Figure(
                name=f"LoCoMo dev {name}",
                value=ours["overall"][name],
                unit="%",
                goal=goals.get(name),
                beside=beside,
            )
        )
    figures.append(
        Figure(
            name="LoCoMo dev recall@10 without adversarial questions",
            value=ours["without_adversarial"]["recall@10"],
            unit="%",
            beside=f"BM25 {bm25['without_adversarial']['recall@10']}",
        )
    )
    figures.append(
        Figure(
            name="CPU a query, all processes of the system",
            value=ours["cpu_ms_per_query"],
            unit="ms",
            goal="<= 15",
            beside=f"BM25 {bm25['cpu_ms_per_query']}, dense {dense['cpu_ms_per_query']}",
        )
    )
    write_results(
        "locomo",
        "python -m benchmarks.bench_locomo",
        figures,
        by_category={name: report["by_category"] for name, report in whole.items()},
        weights="each conversation ranked by weights learned from the others",
    )


if __name__ == "__main__":
    main()
