"""Records how transformers saves the published Qwen2.5-VL configs again, to tests/golden/qwen_configs.json.

    python tests/make_golden_configs.py        once in an environment with transformers 4.57.6, once with 5.23.0
"""
import json
import tempfile
from pathlib import Path

import transformers
from transformers import Qwen2_5_VLConfig

from published import HUB_3B, HUB_7B

if __name__ == "__main__":
    file = Path(__file__).parent / "golden" / "qwen_configs.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found[transformers.__version__] = {}
    for name, hub in (("3B", HUB_3B), ("7B", HUB_7B)):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hub))
            Qwen2_5_VLConfig.from_pretrained(folder).save_pretrained(folder)
            found[transformers.__version__][name] = json.loads((Path(folder) / "config.json").read_text())
    file.write_text(json.dumps(found, indent=1) + "\n")
