"""A server of Weights & Biases for tests: it answers the real client on loopback, and keeps what it is told.

It knows the calls that runs, `wandb sweep` and `wandb agent` make. What a sweep tries next, the test says: how the real
server decides that is its own matter, and what it is sent is ours.
"""

# ruff: noqa: N802 (methods are named as the operations that they answer)

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

KEY = "0123456789abcdef" * 2 + "01234567"
PROJECT = {"id": "UHJvamVjdA==", "name": "featinv-pl", "entity": {"id": "RW50aXR5", "name": "we"}}
ID = "QQ=="


@dataclass
class Run:
    """What is known of a run: by `starts`, what the client said each time that it began or continued it."""

    state: str = "pending"
    starts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    def values(self, metric: str) -> list[Any]:
        """A metric over time."""
        return [row[metric] for row in self.history if metric in row]


class WandbServer(ThreadingHTTPServer):
    """All that has arrived, and what agents are told.

    Attributes:
        runs: By name.
        sweeps: Their configurations, by name.
        proposals: The parameters that a sweep tries, one run after the other.
        received: Every body of a request, for tests that look for secrets.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Any] = {}
        self.proposals: list[dict[str, Any]] = []
        self.received: list[bytes] = []
        self.lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def handle_error(self, *_: Any) -> None:
        """A client that has ended closes its connections without a word."""
        if not isinstance(sys.exception(), ConnectionError):
            raise

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a query in GraphQL by the method of its operation; with nothing, if there is none."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        assert found is not None, query
        method = getattr(self, f"_{found[1]}", None)
        with self.lock:
            answer: dict[str, Any] = method(variables) if method else {}
        return answer

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": ID, "entity": "we", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables["id"]
        run = self.runs.setdefault(name, Run())
        run.starts.append(variables)
        run.state = "running"
        run.config |= {key: item["value"] for key, item in json.loads(variables.get("config") or "{}").items()}
        sweep = next((key for key in self.sweeps if name.startswith(f"{key}run")), None)
        bucket = {"id": name, "name": name, "displayName": variables.get("displayName") or name, "config": "{}"}
        bucket |= {"sweepName": sweep, "historyLineCount": len(run.history), "project": PROJECT}
        return {"upsertBucket": {"bucket": bucket, "inserted": len(run.starts) == 1}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, bucket = self.runs.get(variables["name"]), None
        if run is not None and run.starts:
            config = {key: {"value": value} for key, value in run.config.items()}
            tail = [json.dumps(row) for row in run.history[-1:]]
            bucket = {"name": variables["name"], "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"}
            bucket |= {"summaryMetrics": json.dumps(run.summary), "config": json.dumps(config)}
            bucket |= {"historyLineCount": len(run.history), "historyTail": json.dumps(tail)}
            bucket |= {name: run.starts[0].get(name) for name in ("displayName", "tags")}
            bucket["wandbConfig"] = '{"t": 1}'  # the client's sign that the run has begun
        return {"model": {"id": ID, "name": PROJECT["name"], "entity": PROJECT["entity"], "bucket": bucket}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        sequence = {"id": ID, "name": "table", "latestArtifact": {"id": ID, "versionIndex": 0}}
        return {"createArtifact": {"artifact": {"id": ID, "state": "COMMITTED", "artifactSequence": sequence}}}

    def _UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = yaml.safe_load(variables["config"])
        return {"upsertSweep": {"sweep": {"name": name, "project": PROJECT}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["sweep"]
        sweep = {"id": name, "name": name, "method": "grid", "state": "RUNNING", "runs": {"edges": []}}
        sweep |= {"config": yaml.safe_dump(self.sweeps[name]), "createdAt": "2026-01-01T00:00:00"}
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": variables["sweep"]}}}

    def _Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["id"]
        running = [run for run, runs in json.loads(variables["runState"] or "{}").items() if runs]
        commands: list[dict[str, Any]] = []
        number = sum(run.startswith(f"{name}run") for run in self.runs)
        if not running and number == len(self.proposals):
            commands = [{"type": "exit"}]
        elif not running:
            args = {option: {"value": value} for option, value in self.proposals[number].items()}
            self.runs[f"{name}run{number}"] = Run()
            commands = [{"type": "run", "run_id": f"{name}run{number}", "program": None, "args": args}]
        return {"agentHeartbeat": {"agent": {"id": name}, "commands": json.dumps(commands)}}

    def stream(self, name: str, contents: dict[str, Any]) -> None:
        """Take in lines of the history and of the summary, and how the run ended."""
        with self.lock:
            run = self.runs.setdefault(name, Run())
            for file, lines in (contents.get("files") or {}).items():
                rows = [json.loads(line) for line in lines["content"] if file.endswith((".jsonl", ".json"))]
                if file == "wandb-history.jsonl":
                    run.history[lines["offset"] : lines["offset"] + len(rows)] = rows
                elif file == "wandb-summary.json":
                    run.summary = rows[-1]
            if contents.get("complete"):
                run.exit_code = contents["exitcode"]
                run.state = "failed" if run.exit_code else "finished"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        _, _, name, file = self.path.split("/", 3)
        self.server.runs[name].files[file] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            contents = json.loads(body)
            self._reply({"data": self.server.answer(contents["query"], contents.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({"exitcode": None, "limits": {}})
        else:  # the client's telemetry
            self._reply({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b"".join(self._chunks())
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append(data)
        return data

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _reply(self, contents: dict[str, Any]) -> None:
        data = json.dumps(contents).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve() -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
