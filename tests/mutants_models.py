"""Deliberate mistakes in the model files and in how a checkpoint is read: name -> (a piece of the
source, what replaces it).

mutants.py puts them in one at a time; each must turn a test red.
"""
# in both files, word for word
BOTH = {
    "grouped heads tiled, not repeated": (
        "        y = F.scaled_dot_product_attention(q, cache.keys, cache.values,",
        "        r = self.H // self.G\n"
        "        y = F.scaled_dot_product_attention(q, cache.keys.repeat(1, r, 1, 1),\n"
        "                                           cache.values.repeat(1, r, 1, 1),"),
    "interleaved rope": ("x.roll(x.shape[-1] // 2, -1)",
                         "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
    "no final norm": ("self.lm_head(self.final_norm(stream.x[:, row]))",
                      "self.lm_head(stream.x[:, row])"),
    "logits of the last row, whichever is asked": ("stream.x[:, row]", "stream.x[:, -1]"),
    "not causal": ("is_causal=past is None", "is_causal=False"),
    "not causal behind a cache": (
        "mask = causal_lower_right(T, cache.keys.shape[2])", "mask = None"),
    "causal by the first row behind a cache": (
        "mask = causal_lower_right(T, cache.keys.shape[2])",
        "mask = torch.ones(T, cache.keys.shape[2], dtype=torch.bool).tril()"),
    "no softmax scale": ("attn_mask=mask,", "attn_mask=mask, scale=1.0,"),
    "norm weight plus one": ("return self.weight * F", "return (1 + self.weight) * F"),
    "norm rounded behind the weight": (
        "self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)",
        "F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=self.eps).to(x.dtype)"),
    "decoding position is the length of the last cache": (
        "        next_pos = stream.next_pos + ids.shape[1]\n",
        "        rows = stream.cache[-1].keys.shape[2]\n"
        "        stream = replace(stream, next_pos=rows)\n"
        "        next_pos = rows + ids.shape[1]\n"),
    "several new tokens at one position": (
        "torch.arange(stream.next_pos, next_pos, device=x.device)",
        "torch.full((ids.shape[1],), stream.next_pos, device=x.device)"),
    "no repetition penalty": ("            logits.scatter_(1, seen, penalised)\n", ""),
    "a penalty that favours negative logits": (
        "repeated < 0, repeated * repetition_penalty", "repeated < 0, repeated"),
    "repetition penalty on the prompt alone": (
        "            seen = torch.cat([seen, ids[:, None]], 1)\n", ""),
    "the token that ends an answer in the answer": (
        "                ended[b] = ended[b] or token in self.eos\n"
        "                if not ended[b]:\n"
        "                    answers[b].append(token)\n",
        "                if not ended[b]:\n"
        "                    answers[b].append(token)\n"
        "                ended[b] = ended[b] or token in self.eos\n"),
    "an answer goes on when another has not ended": (
        "ended[b] = ended[b] or token in self.eos", "ended[b] = token in self.eos"),
    "a prompt with two images": ("        if len(places) != 1:\n", "        if not places:\n"),
    "pixels scaled in float32": (
        "astype(np.float64) * (1 / 255)).astype(np.float32)",
        "astype(np.float32) * np.float32(1 / 255))"),
    "bilinear resize": ("Image.BICUBIC", "Image.BILINEAR"),
    "white where nothing is transparent alone": (
        '"A" not in image.getbands() and image.info.get("transparency") is None',
        '"A" not in image.getbands()'),
}

LLAVA = BOTH | {
    "feature layer one too deep": ("num_hidden_layers + 1 + layer",
                                   "num_hidden_layers + 2 + layer"),
    "feature layer one too shallow": ("num_hidden_layers + 1 + layer", "num_hidden_layers + layer"),
    "no pre_layrnorm": ("self.pre_layrnorm(self.embeddings(pixels))", "self.embeddings(pixels)"),
    "CLS kept, last patch dropped": ("return x[:, 1:], saliency", "return x[:, :-1], saliency"),
    "CLIP with the exact GELU": ("x.mul_(torch.sigmoid_(1.702 * x))", "F.gelu(x)"),
    "projector with the tanh GELU": ("F.gelu(self.linear_1(x))",
                                     'F.gelu(self.linear_1(x), approximate="tanh")'),
    "CLIP epsilon": ("c.hidden_size, c.layer_norm_eps)", "c.hidden_size, 1e-6)"),
    "CLIP epsilon when the config leaves it out": ("layer_norm_eps: float = 1e-5",
                                                   "layer_norm_eps: float = 1e-6"),
    "LLaMA epsilon": ("c.hidden_size, c.rms_norm_eps)", "c.hidden_size, 1e-6)"),
    "patches in column order": (".flatten(2).transpose(1, 2)     #",
                                ".transpose(2, 3).flatten(2).transpose(1, 2)     #"),
    "rope theta of the config ignored": (
        'text = text | {"rope_theta": new_rope["rope_theta"]}', "pass"),
    "rope theta when the config leaves it out": ("rope_theta: float = 1e4",
                                                 "rope_theta: float = 1e6"),
    "image between the wrong rows": ("x[start:start + V] = features", "x[:V] = features"),
    "padding rounded up": ("int(m * 255)", "round(m * 255)"),
    "crop rounded up": ("(image.width - size) // 2", "(image.width - size + 1) // 2"),
    "long edge rounded": ("int(size * max(image.size) / min(image.size))",
                          "round(size * max(image.size) / min(image.size))"),
    "alpha dropped when cropping": (
        'pad_to_square(image) if mode == "pad" else on_white(image)',
        'pad_to_square(image) if mode == "pad" else image.convert("RGB")'),
    "image padded at one side": ("((side - image.width) // 2, (side - image.height) // 2)",
                                 "(0, 0)"),
    "saliency of the patches, not of CLS": ("q[:, :, :1].float()", "q[:, :, 1:2].float()"),
    "an answer with BOS": ("self.tokenizer.encode(answer, add_special_tokens=False).ids",
                           "self.tokenizer.encode(answer).ids"),
    "blocks after the feature layer are not ignored": ("    for block in unused:",
                                                       "    for block in []:"),
    "a tied head that is not stored is missing": ("    if config.tie_word_embeddings:",
                                               "    if False:"),
}

QWEN = BOTH | {
    "alpha dropped": ("on_white(image).resize", 'image.convert("RGB").resize'),
    "rope theta of the config ignored": ('for name in ("rope_theta", "mrope_section"):',
                                         'for name in ("mrope_section",):'),
    "LLM epsilon": ("RMSNorm(c.hidden_size, c.rms_norm_eps)", "RMSNorm(c.hidden_size, 1e-5)"),
    "tower epsilon": ("norm1 = RMSNorm(c.hidden_size, 1e-6)",
                      "norm1 = RMSNorm(c.hidden_size, 1e-5)"),
    "merger epsilon": ("ln_q = RMSNorm(c.hidden_size, 1e-6)",
                       "ln_q = RMSNorm(c.hidden_size, 1e-5)"),
    "no biases on queries": ("self.q_proj = nn.Linear(c.hidden_size, self.H * self.D)",
                             "self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=False)"),
    "no M-RoPE: every axis is t": ("part[axis] for axis, part", "part[0] for axis, part"),
    "h and w swapped in the decoder": ("part[axis] for axis, part",
                                       "part[[0, 2, 1][axis]] for axis, part"),
    "interleaved M-RoPE sections": (
        "angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)",
        "angles = torch.stack([angles[i % 3, ..., i] for i in range(angles.shape[-1])], -1)"),
    "text goes on after rows * columns": ("    pos[:, end:] += shift\n", ""),
    "text goes on after the rows": ("    pos[:, end:] += shift\n",
                                    "    pos[:, end:] += rows - rows * cols\n"),
    "decoding position is the number of rows": ("return pos, T + shift", "return pos, T"),
    "image from position 0": ("pos[1, start:end] = start + ", "pos[1, start:end] = "),
    "raster patches": (
        "return x.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 3)",
        "return x.flatten(0, 1)"),
    "y and x swapped in the tower": ("for place in (y, x)", "for place in (x, y)"),
    "tower rope theta": ("inv_freq = 1e4 **", "inv_freq = 1e6 **"),
    "full attention everywhere": ("None if i in full_blocks else window", "None"),
    "windows everywhere": ("None if i in full_blocks else window", "window"),
    "windows and full attention swapped": ("None if i in full_blocks",
                                           "None if i not in full_blocks"),
    "window twice as wide": ("self.c.window_size // self.c.patch_size // m ",
                             "self.c.window_size // self.c.patch_size "),
    "padding of windows attended to": (
        "return index, place, None if mask.all() else mask[:, None]", "return index, place, None"),
    "patches not put back": ("filled[index.flatten()[filled].argsort()]", "filled"),
    "merger with the tanh GELU": ("nn.GELU()", 'nn.GELU("tanh")'),
    "MLP with GELU": ("F.silu(self.gate_proj(x), inplace=True)", "F.gelu(self.gate_proj(x))"),
    "halves rounded up": ("round(height / factor) * factor",
                          "math.floor(height / factor + 0.5) * factor"),
    "shrunk image rounded up": ("math.floor(height / shrink / factor)",
                                "math.ceil(height / shrink / factor)"),
    "grown image rounded down": ("math.ceil(width * grow / factor)",
                                 "math.floor(width * grow / factor)"),
    "saliency of the first full block": ("if i == max(", "if i == min("),
    "saliency sent, not received": (".softmax(-1).sum((1, 2))", ".softmax(-2).sum((1, 3))"),
    "a tied head that is not stored is missing": ("    if config.tie_word_embeddings:",
                                                  "    if False:"),
    "the caller's bounds ignored": ("config.max_pixels = max_pixels", "pass"),
}

CHECKPOINT = {
    "a stored head ignored when tied": ("(embedding in weights) != (head in weights)",
                                        "embedding in weights"),
    "truncation of the tokenizer kept": ("    tokenizer.no_truncation()\n", ""),
    "padding of the tokenizer kept": ("    tokenizer.no_padding()\n", ""),
    "a null that ends answers": ("    if ids is None:\n", "    if not file.exists():\n"),
    "token 0 taken for none": ("    if ids is None:\n", "    if not ids:\n"),
    "a tensor of another shape": ("check_shape(tensor, wanted[name], key, shard)", "pass"),
    "an unknown tensor": ("            elif not re.search(ignored, name):\n",
                          "            elif False:\n"),
    "a tensor that is missing": ("    if missing:\n", "    if False:\n"),
    "one shard alone": ("    for shard in find_shards(path):\n",
                        "    for shard in find_shards(path)[:1]:\n"),
    "true taken for a number": ("type(value) is int and value > 0",
                                "isinstance(value, int) and value > 0"),
    "a negative size": ("type(value) is int and value > 0", "type(value) is int"),
    "a string as a section": ("    if not isinstance(value, dict):\n", "    if False:\n"),
    "bounds of a model that has none": (
        "        if name not in inspect.signature(module.load).parameters:\n",
        "        if False:\n"),
    "a bound saved as size ignored": ("(size.get(of_size), raw.get(name))", "(raw.get(name),)"),
    "a tensor that is there twice": ("if name in weights:\n", "if False:\n"),
    "cuDNN's attention stays on": ("torch.backends.cuda.enable_cudnn_sdp(False)", "pass"),
    "a relative of a model taken for unknown": (
        "MODELS.get(kind) or RELATIVES.get(kind)", "MODELS.get(kind)"),
    "stored precision kept": (".to(device).to(dtype)", ".to(device)"),
}

MUTANTS = {"model_llava.py": LLAVA, "model_qwen.py": QWEN, "support/checkpoint.py": CHECKPOINT}
