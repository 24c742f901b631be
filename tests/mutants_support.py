"""Deliberate mistakes in eval.py, in information.py's program and below stairs:
name -> (a piece of the source, what replaces it).

mutants.py puts them in one at a time; each must turn a test red.
"""
EVAL = {
    "every question draws alike": ("[cell.seed + question.seed for cell in batch]",
                                   "[cell.seed for cell in batch]"),
    "one seed for all": ("Cell(name, schedule, args.seed + seed, compared_with)",
                         "Cell(name, schedule, args.seed, compared_with)"),
    "batches by layer alone": ("tuple((layer, number_kept(amount, N)) for layer, _, amount",
                               "tuple((layer, 0) for layer, _, amount"),
    "every stage keeps what the first does": ("n = number_kept(amount, stream.N)",
                                              "n = number_kept(schedule[0][2], stream.N)"),
    "what was measured at another layer": ("info.get(layer), args.positions",
                                           "info.get(min(info, default=0)), args.positions"),
    "positions always kept": ("info.get(layer), args.positions)", "info.get(layer))"),
    "no repetition penalty": ("model.decode(stream, args.max_new_tokens, args.repetition_penalty)",
                              "model.decode(stream, args.max_new_tokens)"),
    "random compared with the unpruned": ('"minus_random": minus(others["random"])',
                                          '"minus_random": minus("")'),
    "none compared at layer 0": ("minus(format_schedule(drop_all(layer)))",
                                 "minus(format_schedule(drop_all(0)))"),
    "errors by question": ("    image = images_of(questions)\n",
                           "    image = np.arange(len(questions))\n"),
    "a failed question left out of the score": (
        'record["scores"][cell.key] if record else 0.0',
        'record["scores"][cell.key] if record else 1.0'),
    "tokens of the last layer as their mean": ("tokens.append(np.mean(alive))",
                                               "tokens.append(alive[-1])"),
    "FLOPs of visual rows alone": ('[record["text_rows"] + V for V in alive]',
                                   "[V for V in alive]"),
    "layer 0 always whole": ("changes = [[0, tokens[0]]]", "changes = [[0, N]]"),
    "keeping nothing drawn by seed": ("amount in (0, 1) and not", "amount in (1,) and not"),
    "keeping all drawn by seed": ("amount in (0, 1) and not", "amount in (0,) and not"),
    "keeping one taken for keeping none": ("in (0, 1) and not keeps_one", "in (0, 1)"),
    "compared with the last schedule": ("first = schedules[0] if", "first = schedules[-1] if"),
    "horizon stands for layer 0": ('f"@{horizon_layer}"', '"@0"'),
    "calibration questions scored": ("questions = runs.sample(questions, args.limit",
                                     "questions = runs.sample(known, args.limit"),
    "empty answers not counted": ('counts["empty"] += not record["answers"][cell.key].strip()',
                                  'counts["empty"] += not record["answers"][cell.key]'),
}

PROGRAM = {
    "calibration by seed 0": ("runs.sample(questions, args.calibrate, args.seed)",
                              "runs.sample(questions, args.calibrate, 0)"),
    "the rule ignored": ('[args.rule]["layer"]', '["score"]["layer"]'),
    "no horizon taken for the last layer": ("    if layer == model.num_layers:\n",
                                            "    if False:\n"),
    "questions that failed not counted": ("return layer, others, len(chosen) - len(answered)",
                                          "return layer, others, 0"),
    "the threshold ignored": ("divergence_horizon(curve, args.threshold)",
                              "divergence_horizon(curve)"),
    "the tolerance ignored": ("horizon(curve[1:], curve[0], args.tolerance)",
                              "horizon(curve[1:], curve[0])"),
    "maps stored in half precision": ('astype("<f4").tobytes()', 'astype("<f2").tobytes()'),
}

STATISTICS = {
    "equal values take the last of their ranks": (" - (counts - 1) / 2)", ")"),
    "a correlation of values, not of ranks": ("    a = ranks(a)\n    b = ranks(b)\n", ""),
    "questions without a correlation count": ("known = ~np.isnan(column)",
                                              "known = column == column[0]"),
    "the mean of images' means": ("sums[draws].sum(1) / sizes[draws].sum(1)",
                                  "(sums / sizes)[draws].mean(1)"),
    "a horizon of images' means": ("sums[:, pick].sum(1) / sizes[pick].sum()",
                                   "(sums / sizes)[:, pick].mean(1)"),
    "errors not around the mean": ("np.bincount(image, scores - scores.mean())",
                                   "np.bincount(image, scores)"),
    "errors of a known mean": ("variance = (sums ** 2).sum() * clusters / (clusters - 1)",
                               "variance = (sums ** 2).sum()"),
    "90 % called 95": ("[2.5, 97.5]", "[5, 95]"),
    "cost on the calibration questions": ("scores[~inside]", "scores[inside]"),
    "the rule sees all questions": ("rule(curves[inside].mean(0))", "rule(curves.mean(0))"),
    "half an image": ("inside = np.isin(image, chosen)",
                      "inside = np.isin(image, chosen) & (rng.random(len(image)) < 0.5)"),
    "Gini of signed values": ("x = np.sort(abs(values))", "x = np.sort(values)"),
    "noise taken for negative": ("values < -NOISE", "values < 0"),
    "negative information is none": ('if abs(row["mean"]) >= max', 'if row["mean"] >= max'),
    "noise taken for information": ("max(0.01 * base, rounding)", "0.01 * base"),
    "compared with layer 0": ('        if row["layer"] == 1:\n', '        if row["layer"] == 0:\n'),
}

REPORT = {
    "a lead without its interval": ("if row[key][1] > 0]", "if row[key][0] > 0]"),
    "a loss without its interval": ("if row[key][2] < 0]", "if row[key][0] < 0]"),
    "oracles counted as methods": ("if method and not method.measure and row.get(key):",
                                   "if method and row.get(key):"),
    "a layer too early": ("if layer > last]", "if layer >= last]"),
    "drop everything, whatever helps": ("if less and not more else", "if less else"),
    "the lead of an oracle upside down": ("((-mean, -high, -low), ", "((mean, low, high), "),
    "negative without its interval": ('row["mean"] + 1.96 * error < 0', 'row["mean"] < 0'),
    "a part called all": ("    if asked < known:\n", "    if False:\n"),
    "minus zero": ("(round(value, 1) + 0.0 for value in values)", "values"),
    "minus a little taken for less than zero": ("round(value, 1) + 0.0", "value + 0.0"),
}

RECORDS = {
    "half a record read": ('.split("\\n")[:-1]', ".splitlines()"),
    "other benchmarks forgotten": ("    order = [key for key in records if key in others]\n",
                                   "    order = []\n"),
    "files of processes left": ("                file.unlink()\n", "                pass\n"),
    "the last record alone": ('file.open("a"', 'file.open("w"'),
    "the last images not asked": ("        for ready, future in waiting:\n",
                                  "        for ready, future in []:\n"),
    "any error taken for want of memory": ("return re.search(said, str(error)) is not None",
                                           "return True"),
    "progress in a file": ("    if not (sys.stdout.isatty() and sys.stderr.isatty()):\n",
                           "    if False:\n"),
}

RUNS = {
    "always the same questions": ("random.Random(seed).shuffle(images)",
                                  "random.Random(0).shuffle(images)"),
    "a limit of images": ("limit -= of_image[image]", "limit -= 1"),
    "flags abbreviated": ("allow_abbrev=False", "allow_abbrev=True"),
    "a negative share": ("lambda value: 0 <= value <= 1", "lambda value: value <= 1"),
    "cuda without a number": ('        name = f"cuda:{LOCAL_RANK}"', "        pass"),
    "two runs in one folder": ("        hold(out)\n", "        pass\n"),
    "a limit of none": ("not low <= int(text) < 2 ** 31", "not 0 <= int(text) < 2 ** 31"),
    "other code, same run": ('"code": short_hash(code)', '"code": ""'),
    "other settings gone on with": ("        if differing:\n", "        if False:\n"),
    "positions no setting": ('NOT_SETTINGS = {"out",', 'NOT_SETTINGS = {"positions", "out",'),
    "an interruption without words": ("{str(e) or 'interrupted", "{e or 'interrupted"),
    "a traceback behind head": ("    except BrokenPipeError: ", "    except ZeroDivisionError: "),
    "failures without an exit code": ("    if failed:\n", "    if False:\n"),
    "a device without numbers": ('in ("cpu", "cuda")', 'in ("cpu", "cuda", "meta")'),
}

FILES = {
    "half an image": ("        image.load()\n", ""),
}

BENCHMARKS = {
    "gold is any normalised answer": (
        "return max(normalised, key=self.points, default=self.answers[0].lower())",
        "return normalised[0] if normalised else self.answers[0].lower()"),
    "gold is the first of the best": ("Counter(written).most_common(1)[0][0]", "written[0]"),
    "yes anywhere in an answer": ("if word in answer[:4]:", "if word in answer:"),
    "acc+ of either question": ("both = [min(pair)", "both = [max(pair)"),
    "a third of a point": ("min(1.0, round(0.3 * agreeing, 1))", "min(1.0, agreeing / 3)"),
    "articles kept": (" if word not in ARTICLES]", "]"),
    "a letter without its blank": ('answer[1:3] == ". "', 'answer[1:2] == "."'),
    "yes and no swapped": ('"no" if {"No", "not", "no"}', '"yes" if {"No", "not", "no"}'),
    "two answers of a question": ("        if twin is not question:\n", "        if False:\n"),
    "F1 of files that are there": ("if complete else None\n", "if each else None\n"),
}

ANSWERS = {
    "text questions in the score": ('if pair[0].group != "text"]', "if pair]"),
    "the old spelling of image": ('.replace("imange", "image")', ""),
    "answered twice": ("        if question.id not in others:\n", "        if True:\n"),
    "half a pair of MME": ("        if count == 1:\n", "        if False:\n"),
    "joined without the question": ('    return f"{id}: {text}"\n', "    return id\n"),
}
