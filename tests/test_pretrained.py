"""Pretrained weights from a hub: a local server in its place, absent, slow, or not needed."""

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class SlowHub(http.server.BaseHTTPRequestHandler):
    """Serves server.body as every .safetensors file, and answers only after server.delay seconds."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        time.sleep(self.server.delay)
        self.server.asked.append(self.path)
        self.send_response(200)
        headers = {"X-Repo-Commit": "0" * 40, "ETag": '"weights"', "Content-Length": len(self.server.body)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.body)


# In a process of its own: huggingface_hub reads its variables when it is imported.
FROM_HUB = """
import time
from depict_kernels.models.backbone import Backbone, PretrainedWeightsError
begun = time.monotonic()
try:
    vit = Backbone("vit_tiny_patch16_224", img_size=32, pretrained=True, depth=1).vit
    print(vit.cls_token.detach().double().sum().item())
except PretrainedWeightsError as error:
    print(error)
print(time.monotonic() - begun)
"""


def from_hub(endpoint, cache):
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "*", "no_proxy": "*"}
    variables |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", FROM_HUB],
        env=os.environ | variables, capture_output=True, text=True, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said, seconds = result.stdout.splitlines()
    return said, float(seconds)


@pytest.mark.slow
def test_without_a_network_pretrained_weights_stop_soon(tmp_path):
    said, seconds = from_hub("http://127.0.0.1:1", tmp_path)
    assert "not in the local cache and http://127.0.0.1:1 cannot be reached (" in said
    assert "--model.checkpoint_path FILE" in said and "--model.pretrained false" in said
    assert seconds < 20  # 3 s of pauses; the hub's own retries wait 23 s for each of two files


@pytest.mark.slow
def test_a_slow_hub_is_waited_for_and_a_cached_file_needs_none(tmp_path):
    import safetensors.torch
    import timm

    torch.manual_seed(1)  # what a model of seed 0 holds is what loading checks for
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        server.delay, server.asked = 1.5, []  # longer than HF_HUB_ETAG_TIMEOUT
        server.body = safetensors.torch.save(source.state_dict())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, seconds = from_hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    expected = pytest.approx(source.cls_token.detach().double().sum().item())
    assert float(said) == expected and seconds > 2.5 and len(server.asked) >= 2
    said, seconds = from_hub("http://127.0.0.1:1", tmp_path)  # from the cache
    assert float(said) == expected and seconds < 20
