"""What Ray's own metrics and dashboard know of a run."""

import time
import urllib.request
from pathlib import Path

import pytest
import ray

from moeflow.run.progress import Show
from moeflow.run.ray import runner as on_ray
from moeflow.store import Store
from tests.run import toy


class Heard(Show):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def counted(name: str, step: str) -> float:
    """A counter of one step, as the nodes offer it to Prometheus: with a delay, and so asked again for a minute."""
    ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
    for _ in range(60):
        lines = [
            line
            for host, port in ports
            for line in urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).read().decode().splitlines()
            if line.startswith((f"ray_{name}{{", f"ray_{name}_total{{")) and f'step="{step}"' in line
        ]
        if lines:
            return max(float(line.rpartition(" ")[2]) for line in lines)
        time.sleep(1)
    return 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_rays_metrics_have_steps_bytes_and_retries(store: Store, trace: Path, tmp_path: Path) -> None:
    on_ray.run([toy.total(*(toy.half(toy.number(n=n)) for n in (10, 20, 30)))], store)
    on_ray.run([toy.count(to=8, die_at=5, marker=str(tmp_path / "died"), trace=str(trace))], store)
    assert counted("moeflow_steps", "toy.half") == 3
    assert counted("moeflow_written_bytes", "toy.half") > 0
    assert counted("moeflow_retries", "toy.count") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_the_dashboards_address_is_said(store: Store, rays: Path) -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=True, log_to_driver=False, _temp_dir=str(rays))
    try:
        heard = Heard()
        on_ray.run([toy.number(n=1)], store, progress=heard)
        (line,) = [line for line in heard.said if line.startswith("Ray's dashboard: http://")]
        assert urllib.request.urlopen(line.rpartition(" ")[2], timeout=30).status == 200
    finally:
        ray.shutdown()
