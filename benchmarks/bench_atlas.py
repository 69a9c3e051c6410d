"""What the Atlas costs: opening a run of 10,000 episodes, and each of its views, asked as a browser asks.

The run is generated: episodes of the scripted expert, recorded and then copied under other numbers, beside a published
experiment whose table of episodes has as many rows, and an index of an untrained autoencoder's features over a policy's
activations, nearly all of which are active somewhere. Every answer is checked for what it must hold before it is timed.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fastapi.testclient import TestClient
from harness import RESULTS, ROOT, commit, machine, write_json
from rich.console import Console
from rich.table import Table

from hooked_vla import HookedVLA
from hooked_vla.atlas.app import Server, create_app
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.serve import warm_views
from hooked_vla.rollouts.records import MANIFEST, read_episodes, read_steps
from hooked_vla.rollouts.sae.collect import collect
from hooked_vla.rollouts.sae.index import build_index
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import preset

# what was asked for: seconds to open, and milliseconds to answer
OPEN_S, ANSWER_MS = 2.0, 300.0
PORT = 8765
SOURCES = 12
EXPERIMENT = ROOT / "docs" / "results" / "E4" / "smolvla-tabletop"
MODEL, SITE = "smolvla-tabletop", "vlm.blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Indexed:
    """Size of the index: features, active ones a token, and the episodes that they are looked up in."""

    n_features: int
    k: int
    episodes: int


FULL, QUICK = Indexed(16_384, 32, 60), Indexed(256, 8, 2)


def generate(folder: Path, episodes: int) -> None:
    """FOLDER/rollouts with so many episodes, and FOLDER/E4 with a table as long, or as it was published."""
    rollouts = folder / "rollouts"
    run_rollouts("expert", "goal", SOURCES, 700_000, out=rollouts)
    kinds = {"steps": read_steps(rollouts), "episodes": read_episodes(rollouts)}
    sources = {kind: [table.filter(pa.array(table["episode"].to_numpy() == i)) for i in range(SOURCES)]
               for kind, table in kinds.items()}  # fmt: skip
    manifest = json.loads((rollouts / MANIFEST).read_text())
    scenes = [[manifest["scenes"][i % SOURCES][0], 700_000 + i] for i in range(episodes)]
    write_json(rollouts / MANIFEST, {**manifest, "scenes": scenes})
    for i in range(SOURCES, episodes):
        for kind, tables in sources.items():
            table = tables[i % SOURCES]
            for name, value in (("episode", i), ("seed", 700_000 + i)):
                if name in table.column_names:
                    at = table.column_names.index(name)
                    table = table.set_column(at, table.schema.field(name), pa.array([value] * len(table), pa.int64()))
            path = rollouts / kind / f"{i // 1000:03d}" / f"{i:09d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    shutil.copytree(EXPERIMENT, folder / "E4")
    table = pq.read_table(folder / "E4" / "tables" / "episodes.parquet")
    many = pa.concat_tables([table] * -(-episodes // len(table))).slice(0, max(episodes, len(table)))
    pq.write_table(many, folder / "E4" / "tables" / "episodes.parquet")


def generate_index(folder: Path, size: Indexed) -> None:
    """FOLDER/activations of a shipped policy, and FOLDER/index of an autoencoder's features over them."""
    model = HookedVLA.from_pretrained(MODEL).requires_grad_(False)
    options = Options(n_envs=min(4, size.episodes))
    store = collect(model, "goal", [SITE], size.episodes, 0, folder / "activations", options=options, name=MODEL)
    width = store.widths[SITE]
    sae = SparseAutoencoder(
        preset("hooked", MODEL, SITE, width, architecture="topk", n_features=size.n_features, k=size.k)
    )
    sae.start(store.read(SITE, torch.arange(min(store.n_rows(SITE), 4096))))
    build_index(store, sae.eval(), folder / "index")


def paths(client: TestClient, episodes: int) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What the views ask for, by name: a path, and whether an answer is the right one."""
    about = client.get("/api/experiments/E4/table/episodes").json()
    measure = next(i for i, column in enumerate(about["columns"]) if column["role"] == "measure")
    rows, columns = (about["grid"][side] for side in ("rows", "columns"))
    last = episodes - 1
    # the feature with the most to show
    densest = client.get("/api/features/index/find?sort=density").json()["rows"][0]["feature"]
    return {
        "experiments": ("experiments", lambda said: len(said) == 1),
        "an experiment": ("experiments/E4", lambda said: len(said["tables"]) >= 4),
        "its results": ("experiments/E4/table/results/page/0", lambda said: said["total"] > 30),
        "a long table: its columns": ("experiments/E4/table/episodes", lambda said: said["total"] >= episodes),
        "its last page": (f"experiments/E4/table/episodes/page/{last // 200}", lambda said: said["rows"]),
        "its heat map": (f"experiments/E4/grid/episodes/{measure}/{rows}/{columns}", lambda said: said["cells"]),
        "the rows of a cell": ('experiments/E4/rows/episodes?where={"arm":"rerun"}', lambda said: said["total"] > 30),
        "models": ("models", lambda said: len(said) > 6),
        "a model": ("models/smolvla-tabletop", lambda said: said["boxes"]),
        "its results by place": ("models/smolvla-tabletop/results", lambda said: said),
        "rollouts": ("rollouts", lambda said: said),
        "a folder of rollouts": ("rollouts/rollouts", lambda said: said),
        "its first page of episodes": ("rollouts/rollouts/page/0", lambda said: said),
        "its last page of episodes": (f"rollouts/rollouts/page/{last // 200}", lambda said: said),
        "episodes of a task": ("rollouts/rollouts/find?task=red-orange", lambda said: said),
        "an episode": (f"rollouts/rollouts/episode/{last}", lambda said: said),
        "indexes of features": ("features", lambda said: len(said) == 1),
        "an index": ("features/index", lambda said: said),
        "every feature's figures": ("features/index/columns", lambda said: said),
        "their map": ("features/index/map/pca", lambda said: said),
        "features by density": ("features/index/find?sort=density&page=1", lambda said: said),
        "features by text": ("features/index/find?text=grasp%20red", lambda said: said),
        "the densest feature": (f"features/index/feature/{densest}", lambda said: said["plans"]["top"]),
    }  # fmt: skip


def timed(ask: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor and wall milliseconds of a call, all threads of the process together, and what it gave."""
    processor, wall = time.process_time(), time.perf_counter()
    found = ask()
    return (time.process_time() - processor) * 1e3, (time.perf_counter() - wall) * 1e3, found


def client_of(folder: Path, cache: Path) -> tuple[Run, TestClient]:
    run = Run.open(folder, cache)
    return run, TestClient(create_app(run, Server(PORT)), base_url=f"http://127.0.0.1:{PORT}")


def opened(folder: Path, cache: Path) -> tuple[Run, TestClient]:
    """A run with what the page asks for first: itself, and the first view."""
    run, client = client_of(folder, cache)
    for path in ("/", "/app.js", "/app.css", "/plotly.min.js", "/api/experiments"):
        if client.get(path).status_code != 200:
            raise SystemExit(f"{path} was not answered")
    return run, client


def index_made(client: TestClient, wait_s: float = 600.0) -> float:
    """Wait until the table of episodes is made in the background; the seconds that took."""
    start = time.perf_counter()
    while time.perf_counter() - start < wait_s:
        if client.get("/api/rollouts/rollouts/find?task=red-orange").status_code == 200:
            return time.perf_counter() - start
        time.sleep(0.2)
    raise SystemExit(f"the table of episodes was not made within {wait_s:.0f} s")


def measure_views(client: TestClient, episodes: int, rounds: int) -> list[dict[str, Any]]:
    """Every path: its first answer, which is what counts, and the median of the later ones, in milliseconds."""
    rows = []
    for name, (path, right) in paths(client, episodes).items():
        first, wall, answer = timed(lambda path=path: client.get(f"/api/{path}"))
        if answer.status_code != 200 or not right(answer.json()):
            raise SystemExit(f"{path} was answered with {answer.status_code}: {answer.text[:200]}")
        again = [timed(lambda path=path: client.get(f"/api/{path}")) for _ in range(rounds)]
        rows.append({"view": name, "first_ms": first, "ms": median(each[0] for each in again), "first_wall_ms": wall,
                     "wall_ms": median(each[1] for each in again), "bytes": len(answer.content)})  # fmt: skip
    return [{key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def main() -> None:
    """Measure, show and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 episodes, few features: that everything works")
    parser.add_argument("--episodes", type=int, help="of the generated run (default 10,000, quick 400)")
    parser.add_argument("--rounds", type=int, default=5, help="later answers of each view")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_atlas_cpu.json", help="where the result goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    episodes = options.episodes or (400 if options.quick else 10_000)
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-atlas-") as temporary:
        folder, cache = Path(temporary) / "RUN", Path(temporary) / "cache"
        generate(folder, episodes)
        generate_index(folder, size)
        # the first one imports what the views need
        opened(folder, cache / "first")[0].close()
        open_ms, open_wall_ms, (run, client) = timed(lambda: opened(folder, cache))
        # as the server does in the background, while the page is up
        warm_ms, _, _ = timed(lambda: warm_views(run))
        try:
            index_s = index_made(client)
            rows = measure_views(client, episodes, options.rounds)
        finally:
            run.close()
    targets = [{"view": "open", "limit_s": OPEN_S, "s": round(open_ms / 1e3, 3), "met": open_ms / 1e3 <= OPEN_S}]
    targets += [{"view": row["view"], "limit_ms": ANSWER_MS, "ms": row["first_ms"], "met": row["first_ms"] <= ANSWER_MS}
                for row in rows]  # fmt: skip
    about = {"machine": machine(1), "commit": commit(), "date": time.strftime("%Y-%m-%d"), "episodes": episodes,
             "index": asdict(size), "rounds": options.rounds,
             "open_s": round(open_ms / 1e3, 3), "open_wall_s": round(open_wall_ms / 1e3, 3),
             "warm_s": round(warm_ms / 1e3, 2), "index_wall_s": round(index_s, 1)}  # fmt: skip
    write_json(options.json, {**about, "rows": rows, "targets": targets})
    table = Table("view", "first answer, ms", "later, ms", "bytes", title=f"open: {about['open_s']} s")
    for row in rows:
        table.add_row(row["view"], *(f"{row[key]:,}" for key in ("first_ms", "ms", "bytes")))
    Console().print(table)
    missed = [target["view"] for target in targets if not target["met"]]
    Console().print(f"missed: {missed}" if missed else "all targets met")


if __name__ == "__main__":
    main()
