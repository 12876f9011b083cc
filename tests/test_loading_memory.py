"""Weights are read into place: a pipeline is never in memory twice."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from tests import tiny_pipelines as tiny

LOAD = """
import json, sys, threading, time, torch, steer

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

small, folder, dtype = sys.argv[1:4]
steer.load(small)  # what is imported on the way
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
flow = steer.load(folder, dtype=getattr(torch, dtype))
done.set()
thread.join()
print(json.dumps([peak[0] - before, anonymous() - before]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline of 320 MB in float32, in one file a part and in shards of bfloat16."""
    root = tmp_path_factory.mktemp("large")
    tiny.save("flux", root / "small")
    pipe = tiny.build("flux")
    config = dict(pipe.transformer.config) | {
        "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 64,
        "num_attention_heads": 12, "axes_dims_rope": (8, 28, 28),
    }  # fmt: skip
    pipe.transformer = diffusers.FluxTransformer2DModel(
        **{k: v for k, v in config.items() if not k.startswith("_")}
    )
    text = copy.deepcopy(pipe.text_encoder_2.config)
    text.num_layers, text.d_ff, text.d_kv, text.num_heads = 12, 3072, 64, 12
    pipe.text_encoder_2 = type(pipe.text_encoder_2)(text)
    pipe.save_pretrained(root / "float32")
    pipe.to(torch.bfloat16).save_pretrained(root / "bfloat16", max_shard_size="50MB")
    return root


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_the_peak_is_what_stays(folders, stored, wanted):
    """Weights of the file's own precision stay in the file's pages; others are made once."""
    found = subprocess.run(
        [sys.executable, "-c", LOAD, folders / "small", folders / stored, wanted],
        check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    peak, after = json.loads(found.stdout.splitlines()[-1])
    files = sum(f.stat().st_size for f in (folders / "float32").rglob("*.safetensors"))
    weights = files if wanted == "float32" else files / 2
    most = 0 if stored == wanted else weights
    assert peak <= 1.05 * most + 16e6
    assert peak <= after + 16e6
