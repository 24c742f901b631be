"""Deliberate mistakes in tokprune.py and information.py: name -> (a piece of the source, what
replaces it).

mutants.py puts them in one at a time; each must turn a test red.
"""
TOKPRUNE = {
    # streams, caches
    "a cache is appended to in front": (
        "torch.cat([self.keys.expand(B, -1, -1, -1), k], 2)",
        "torch.cat([k, self.keys.expand(B, -1, -1, -1)], 2)"),
    "rows with room written one too early": (
        "keys_room[:, :, self.rows:rows] = k", "keys_room[:, :, self.rows - 1:rows - 1] = k"),
    "room that is made forgets what it holds": (
        "    room[:, :, :t.shape[2]] = t\n    return room", "    return room"),
    "a new room for every row": (
        "        if rows > keys_room.shape[2]:\n", "        if True:\n"),
    "the second variant's set in all": ("torch.stack(kept)", "torch.stack([kept[-1]] * B)"),
    "one seed for all variants": (
        "view_of(model, stream, b, seeds[b], measured)",
        "view_of(model, stream, b, seeds[0], measured)"),
    "information of the first variant's method in all": (
        "info.get(methods[b])", "info.get(methods[0])"),
    "merged rows are not put there": ("if merged[b] is not None:", "if False:"),
    "merged rows written into the stream that was given": (
        "pruned.x[b, start:start + n] = ", "stream.x[b, start:start + n] = "),
    "a method is asked to keep all": ("if n in (0, V):", "if n == 0:"),
    "kept rows get the positions of the first": (
        "pos = stream.pos.gather(-1, rows.expand(*axes, -1, -1))",
        "pos = stream.pos[..., :rows.shape[1]].expand(*axes, B, -1)"),
    "kept rows are counted from row 0": (
        "torch.cat([before, start + idx, after], 1)", "torch.cat([before, idx, after], 1)"),
    "a kept row's index among those alive, not among the N": (
        "origin = stream.origin.gather(1, idx)", "origin = idx"),
    "queries of rows that left are kept": (
        "origin=origin, queries=None)\n\n\ndef expand", "origin=origin)\n\n\ndef expand"),
    "compact positions do not move the answer": (
        "        next_pos = x.shape[1]\n", "        next_pos = stream.next_pos\n"),
    "prefill draws with seed 0": ("method, n, seed, positions=", "method, n, 0, positions="),
    "prefill ignores positions": (", seed, positions=positions)", ", seed)"),
    "a ratio of those alive, not of the N": (
        "n = number_kept(amount, stream.N)", "n = number_kept(amount, stream.visual[1])"),
    # what a method sees
    "visual rows as the stream has them, not in float32": (
        "self.x[start:start + V].float()", "self.x[start:start + V]"),
    "every stage draws alike": ("seed = seed + 1_000_003 * stream.layer", "seed = seed + 0"),
    "saliency of the first tokens, whoever is alive": (
        "saliency_of(stream)[origin]", "saliency_of(stream)[:len(origin)]"),
    "information of the first tokens, whoever is alive": (
        "info.to(origin.device)[origin]", "info.to(origin.device)[:len(origin)]"),
    "keys by column": (
        "view.keys = k.transpose(0, 1).flatten(1)", "view.keys = k.permute(1, 2, 0).flatten(1)"),
    "key heads tiled, not repeated": (
        "k.float().repeat_interleave(len(q) // len(k), 0)",
        "k.float().repeat(len(q) // len(k), 1, 1)"),
    "attention without its scale": ("k.transpose(1, 2) * q.shape[-1] ** -0.5", "k.transpose(1, 2)"),
    "attention to later rows": ("masked_fill(later, -torch.inf)", "masked_fill(later, -1)"),
    "attention forgets the rows before the queries": (
        "device=k.device) + k.shape[1] - q.shape[1]", "device=k.device)"),
    # methods
    "random without its own generator": (
        "torch.randperm(view.visual[1], generator=view.rng)", "torch.randperm(view.visual[1])"),
    "FastV by the highest head": ("[:, 0, start:start + V].mean(0)",
                                  "[:, 0, start:start + V].amax(0)"),
    "FastV by the row before the last": ("[len(view.x) - 1]", "[len(view.x) - 2]"),
    "ties to the highest index": (
        "return score.argsort(descending=True, stable=True)[:n].sort().values",
        "return (len(score) - 1 - score.flip(0).argsort(descending=True, stable=True)[:n])"
        ".sort().values"),
    "SparseVLM's raters by maximum": (
        "(visual @ text.T).softmax(1).mean(0)", "(visual @ text.T).softmax(1).amax(0)"),
    "SparseVLM's relevance over visual tokens": (
        "(visual @ text.T).softmax(1)", "(visual @ text.T).softmax(0)"),
    "SparseVLM where no text token rates": ("    if len(raters) == 0:\n", "    if False:\n"),
    "SparseVLM by the highest rater": (".mean((0, 1))", ".amax((0, 1))"),
    "SparseVLM recycles 20 %": ("int(0.3 * (V - k)) + 1", "int(0.2 * (V - k)) + 1"),
    "SparseVLM recycles the worst": ("order[k:k + t]", "order[-t:]"),
    "merged tokens in another order than their places": (
        "return idx, rows[idx]", "return idx, torch.cat([rows[order[:k]], means])"),
    "clusters of equal density have no order": (
        "rank = density.argsort(descending=True, stable=True).argsort()\n"
        "    denser = rank[None] < rank[:, None]",
        "denser = density[None] > density[:, None]"),
    "a center may belong to another": (
        "    member[centers] = torch.arange(c, device=x.device)\n",
        "    member[centers] = 0\n"),
    "DART on hidden states that were not normed": (
        "F.normalize(view.normed().float(), dim=1)", "F.normalize(view.x.float(), dim=1)"),
    "DART by the Euclidean norm": ("float().abs().sum(1)", "float().square().sum(1)"),
    "DART keeps the most similar": (
        "column.masked_fill(taken, torch.inf).argsort(stable=True)",
        "column.masked_fill(taken, -torch.inf).argsort(descending=True, stable=True)"),
    "DART's last pivots take the rest": ("share + 1 if i < rest", "share + 1 if i >= 8 - rest"),
    "DivPrune picks again": ("        nearest[pick] = -torch.inf\n", ""),
    "DivPrune begins with the first token": ("    pick = nearest.argmax()\n    picked",
                                             "    pick = nearest.argmax() * 0\n    picked"),
    "SCOPE without saliency": ("clamp(min=0).sum(0) * saliency", "clamp(min=0).sum(0)"),
    "SCOPE covers with the last pick alone": (
        "covered = torch.maximum(covered, similarity[:, pick][:, 0])",
        "covered = similarity[:, pick][:, 0]"),
    "turns pick a token again": ("        columns[pick] = -torch.inf\n", ""),
    "one token of the answer has every turn": (
        "columns[:, turn % columns.shape[1]]", "columns[:, 0]"),
    "turns change what was measured": ("view.info.float().clone()", "view.info"),
    "a method that needs a layer acts at layer 0": (
        "if layer == 0 and METHODS", "if False and METHODS"),
    # schedules and cost
    "a ratio that is the share kept": (
        "return round(N * (1 - amount))", "return round(N * amount)"),
    "a count above N": ("return min(amount, N)", "return amount"),
    "a count read as a ratio": (
        "amount = float(ratio) if ratio else int(number)", "amount = float(ratio or number)"),
    "a schedule that stays at a layer": ("layer <= schedule[-1][0]", "layer < schedule[-1][0]"),
    "a ratio above 1": ("if ratio and float(ratio) > 1:", "if False:"),
    "tokens come back": (
        "n = min(number_kept(amount, N), tokens[layer])", "n = number_kept(amount, N)"),
    "at_budget's first layer always 2": ("first = 2 if 2 <= budget * L / 4 else 1", "first = 2"),
    "at_budget's first layer from a strict quarter on": ("2 <= budget * L / 4",
                                                         "2 < budget * L / 4"),
    "a budget rounded down": ("alone = math.ceil(", "alone = math.floor("),
    "a quarter of the mean for random": ("past = round(total / L / 5)",
                                         "past = round(total / L / 4)"),
    "more tokens than there are": ("< 1 or with_none > N", "< 1 or with_none < 0"),
    "a stage that keeps nothing": (
        "min(alone, past, with_random) < 1", "min(past, with_random) < 0"),
    "FLOPs of as many value heads as query heads": ("(d_q + 2 * d_kv)", "(3 * d_q)"),
    "FLOPs of the whole attention square": (
        "2 * n * (n + 2 * past) * d_q", "2 * n * (2 * n + 2 * past) * d_q"),
    "FLOPs of half the rows in the cache": ("(n + 2 * past)", "(n + past)"),
    "FLOPs of two MLP matrices": ("6 * n * d * m", "4 * n * d * m"),
}

INFORMATION = {
    "every score against the first layer": ("for ranked_by, truth in zip(of_layers, exact)]",
                                            "for ranked_by, truth in zip(of_layers, exact[:1])]"),
    "the first token's information of the whole answer": (
        "measured(first, \"keep-one\", \"first\")", "measured(answer, \"keep-one\", \"answer\")"),
    "whole-answer information takes the last token's": (
        "values.sum(-1)", "values[..., -1]"),
    "every token of the answer for the first": ("        ids = ids[:1]\n", "        pass\n"),
    "the answer's last token is fed too": (
        "[tokens[0] for tokens in said[:-1]]", "[tokens[0] for tokens in said]"),
    "no turn for the end of the answer": ('if target == "each":\n', "if False:\n"),
    "the end of the answer is one id": ("said.append(sorted(model.eos))",
                                        "said.append(sorted(model.eos)[:1])"),
    "keep-one without its baseline": (
        "values -= probabilities_left(model, streams, full, 0, nothing",
        "values -= 0 * probabilities_left(model, streams, full, 0, nothing"),
    "leave-one-out with the other sign": (
        "values = probabilities(model, full, said).cpu() - values",
        "values = values - probabilities(model, full, said).cpu()"),
    "layers in ascending order, not as asked": (
        "values[[place[layer] for layer in layers]]", "values"),
    "tokens without a grid": ("    if stream.N != rows * cols:\n", "    if False:\n"),
    "an answer without a token": ("    if not ids:\n        raise", "    if False:\n        raise"),
    "answer tokens at the prompt's positions": (
        "pos = torch.cat([stream.pos, answer.pos], -1)",
        "pos = torch.cat([stream.pos, answer.pos - 1], -1)"),
    "a batch twice as large as asked": (
        "max(1, max_batch_tokens // rows)", "max(1, 2 * max_batch_tokens // rows)"),
    "the cached rows are not counted": (
        "rows = full.x.shape[1] - V + prefix + kept.shape[1]",
        "rows = full.x.shape[1] - V + kept.shape[1] - full.visual[0]"),
    "windows of one batch are those of another": (
        "full, prefix, kept[some_windows])", "full, prefix, kept[:len(kept[some_windows])])"),
    "batches a layer at a time": (
        "        together = min(room, layers - i)\n", "        together = 1\n"),
    "the last windows left out": ("for j in range(0, windows, step):",
                                  "for j in range(0, max(1, windows - 1), step):"),
    "the cache without the first visual tokens": (
        "shared = start + prefix ", "shared = start "),
    "variants join a layer late": ("if layer in joining:", "if layer - 1 in joining:"),
    "every layer's cache grows by the batch's own rows": (
        "batch = model.run(replace(batch, cache=cache), stop=layer + 1)",
        "batch = model.run(replace(batch, cache=full.cache), stop=layer + 1)"),
    "rows behind the prefix at the first positions": (
        "pos=stream.pos[..., first:],", "pos=stream.pos[..., :stream.x.shape[1] - first],"),
    "the last joined first": ("x=torch.cat([a.x, b.x])", "x=torch.cat([b.x, a.x])"),
    "positions joined the other way": (
        "torch.cat([a.pos, b.pos], -2)", "torch.cat([b.pos, b.pos], -2)"),
    "every token's probability at the last row": (
        "logits = model.logits(stream, row=t - len(said))", "logits = model.logits(stream)"),
    "probabilities without a softmax": ("logits.softmax(-1)[:, ids]", "logits[:, ids]"),
    "leave-one-out computes everything again": (
        "prefix = int(tokens[0]) // strip * strip", "prefix = 0"),
    "groups by size alone": (
        "together.setdefault((prefix, len(kept)), [])", "together.setdefault(len(kept), [])"),
    "windows in columns": ("token[r:r + window, c:c + window].flatten()",
                           "token[r:r + window, c:c + 1].flatten()"),
    "tokens of a window by column": (
        "values.repeat_interleave(window, 0).repeat_interleave(window, 1)",
        "values.repeat(window, 1).repeat_interleave(window, 1)"),
    "FLOPs without the run with none": (
        "            ours += flops(config, [after] * (L - K), before)\n", ""),
    "FLOPs of one variant a group": ("ours += variants * flops(", "ours += flops("),
    "the oracle gets the whole gold answer": (
        'answer_to_measure(model, stream, question, "first", args)',
        'answer_to_measure(model, stream, question, "answer", args)'),
    "the oracle's turns by windows": ("window=1, target=\"each\"", "window=2, target=\"each\""),
    "hindsight over the layers before": ("torch.stack(seen[layer:]).mean(0)",
                                         "torch.stack(seen[:layer]).mean(0)"),
    "hindsight without the row that writes the first token": (
        "x = torch.cat([stream.x[:, -1:], answer.x], 1)",
        "x = torch.cat([answer.x[:, :1], answer.x], 1)"),
    "hindsight sees the last prompt row twice": (
        "cache = [KV(kv.keys[:, :, :-1], kv.values[:, :, :-1]) for kv in full.cache]",
        "cache = full.cache"),
    "hindsight by the text before the image": (
        "probability[:, :, start:start + N]", "probability[:, :, :N]"),
    "hindsight by the highest head": ("start:start + N].mean(0).T", "start:start + N].amax(0).T"),
    "the model's own answer though the gold one is asked": (
        '    if args.answers == "own":\n', "    if True:\n"),
    "the model's empty answer is measured": ("        if answer:\n", "        if True:\n"),
    "the whole gold answer for its first token": (
        'return question.gold_normalised if target == "first"',
        "return question.gold_written if True"),
    "the horizon is the first layer that reaches the score": (
        "    while layer > 0 and curve[layer - 1] >= full - tolerance * full:\n"
        "        layer -= 1\n"
        "    return layer",
        "    for i, value in enumerate(curve):\n"
        "        if value >= full - tolerance * full:\n"
        "            return i\n"
        "    return layer"),
    "a tolerance of points, not of the score": ("full - tolerance * full", "full - tolerance"),
    "the tolerance excluded": (">= full - tolerance * full", "> full - tolerance * full"),
    "divergence against the largest": ("threshold * curve[0]", "threshold * max(curve)"),
    "divergence that is no less than the threshold": (
        "<= threshold * curve[0]", "< threshold * curve[0]"),
    "divergence the other way round": (
        "F.kl_div(got, want.expand_as(got),", "F.kl_div(want.expand_as(got), got,"),
    "divergence of the last token alone": ("total += F.kl_div(", "total = F.kl_div("),
    "the image dropped a layer late": (
        "        stream = model.run(stream, stop=layer)\n        dropped",
        "        stream = model.run(stream, stop=layer + 1)\n        dropped"),
    "the divergence of an answer without a token": (
        "        return [0.0] * model.num_layers\n", "        ids = model.answer_ids(' ')\n"),
    "an array stored in half the precision": ('astype("<f4").tobytes()',
                                              'astype("<f2").astype("<f4").tobytes()'),
    "the shape of an array lost": ('.reshape(stored["shape"])', ""),
}

MUTANTS = {"tokprune.py": TOKPRUNE, "information.py": INFORMATION}
