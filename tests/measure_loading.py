"""Peak memory of model_llava.load on a made-up LLaVA-1.5 of 7B width and 4 decoder layers, 2.7 GB in bfloat16 in 4 shards.

    python tests/measure_loading.py        about a minute; writes to the temporary folder

Peak is the resident memory of a fresh process (VmHWM, the file's mapped pages included) above that of one that has
imported everything and loaded nothing, after every weight was read once. Linux only.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import model_llava  # noqa: E402

CHILD = """
import re, sys, torch, model_llava
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = model_llava.load(sys.argv[1], "cpu", getattr(torch, sys.argv[2]))
for p in model.parameters():
    p.view(-1)[::512].sum()
print(peak() - before)
"""


def write_checkpoint(folder: Path) -> int:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {
        "num_hidden_layers": 4, "vocab_size": 32064, "rms_norm_eps": 1e-5}, "vision_config": {}}))
    shutil.copy(ROOT / "tests" / "golden" / "llava_tied" / "tokenizer.json", folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_llava.Llava(model_llava.read_config(folder), None, {2}).named_parameters()}
    names, weight_map = sorted(shapes), {}
    for i in range(4):
        part = {name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16) for name in names[i::4]}
        save_file(part, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder))
        print(f"checkpoint: {size / 1e9:.2f} GB bfloat16")
        for dtype in ("bfloat16", "float32"):
            peak = int(subprocess.check_output([sys.executable, "-c", CHILD, folder, dtype], cwd=ROOT))
            print(f"loaded as {dtype}: peak {peak / 1e9:.2f} GB, {peak / size:.3f} of the checkpoint")
