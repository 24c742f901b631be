"""Deliberate mistakes in model_llava.py, one at a time: each must turn tests/test_llava.py red.

    python tests/mutants.py        about a minute and a half; exits with 1 if a mistake goes unnoticed
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = {
    "feature layer one too deep": ("num_hidden_layers + 1 + layer", "num_hidden_layers + 2 + layer"),
    "feature layer one too shallow": ("num_hidden_layers + 1 + layer", "num_hidden_layers + layer"),
    "no pre_layrnorm": ("self.pre_layrnorm(self.embeddings(pixels))", "self.embeddings(pixels)"),
    "CLS kept, last patch dropped": ("return x[:, 1:], cls", "return x[:, :-1], cls"),
    "CLIP with the exact GELU": ("x * torch.sigmoid(1.702 * x)", "F.gelu(x)"),
    "projector with the tanh GELU": ("F.gelu(self.linear_1(x))", 'F.gelu(self.linear_1(x), approximate="tanh")'),
    "CLIP epsilon": ("c.hidden_size, c.layer_norm_eps)", "c.hidden_size, 1e-6)"),
    "CLIP epsilon when the config leaves it out": ("layer_norm_eps: float = 1e-5", "layer_norm_eps: float = 1e-6"),
    "LLaMA epsilon": ("c.hidden_size, c.rms_norm_eps)", "c.hidden_size, 1e-6)"),
    "patches in column order": (".flatten(2).transpose(1, 2)  ", ".transpose(2, 3).flatten(2).transpose(1, 2)  "),
    "grouped heads tiled, not repeated": (
        "        y = F.scaled_dot_product_attention(q, k, v,",
        "        kv = k, v\n        k, v = (t.repeat(1, self.H // self.G, 1, 1) for t in kv)\n"
        "        y = F.scaled_dot_product_attention(q, k, v,"),
    "interleaved rope": ("a, b = x.chunk(2, -1)\n    return x * cos + torch.cat([-b, a], -1) * sin",
                         "a, b = x[..., ::2], x[..., 1::2]\n    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin"),
    "rope theta of the config ignored": ("    config.text.rope_theta = known(", "    ignored = known("),
    "rope theta when the config leaves it out": ("rope_theta: float = 1e4", "rope_theta: float = 1e6"),
    "no softmax scale": ("attn_mask=mask,", "attn_mask=mask, scale=1.0,"),
    "no final norm": ("self.lm_head(self.final_norm(stream.x[:, -1]))", "self.lm_head(stream.x[:, -1])"),
    "norm weight before rounding, plus one": ("return self.weight * (y", "return (1 + self.weight) * (y"),
    "not causal": ("is_causal=past is None and mask is None", "is_causal=False"),
    "gate and up swapped": ("F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    "decoding position is the length of the last cache": ("(1, 1), stream.next_pos,", "(1, 1), stream.cache[-1][0].shape[2],"),
    "image between the wrong rows": ("torch.cat([text[:start], features, text[start + 1:]])", "torch.cat([features, text[:start], text[start + 1:]])"),
    "pixels scaled in float32": ("astype(np.float64) * (1 / 255)).astype(np.float32)", "astype(np.float32) * np.float32(1 / 255))"),
    "bilinear resize": ("Image.BICUBIC", "Image.BILINEAR"),
    "padding rounded up": ("int(m * 255)", "round(m * 255)"),
    "crop rounded up": ("(image.width - size) // 2", "(image.width - size + 1) // 2"),
    "long edge rounded": ("long = int(size * long / short)", "long = round(size * long / short)"),
    "alpha dropped when cropping": ('pad_to_square(image) if mode == "pad" else on_white(image)',
                                    'pad_to_square(image) if mode == "pad" else image.convert("RGB")'),
}

def main():
    unnoticed = []
    for name, (old, new) in MUTANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            for part in ("model_llava.py", "tokprune.py"):
                shutil.copy(ROOT / part, folder)
            shutil.copytree(ROOT / "tests", Path(folder) / "tests")
            source = (ROOT / "model_llava.py").read_text()
            assert old in source, f"{name}: {old!r} is not in model_llava.py any more"
            (Path(folder) / "model_llava.py").write_text(source.replace(old, new))
            run = subprocess.run([sys.executable, "-m", "pytest", "-qx", "tests/test_llava.py"], cwd=folder, capture_output=True, text=True)
        red = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"{name}: {red[0].split(' - ')[0] if red else 'UNNOTICED'}", flush=True)
        unnoticed += [] if red else [name]
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
