import json
from pathlib import Path
import eval as E
G = json.loads((Path(__file__).parent / "golden" / "scorers.json").read_text())
def test_x():
    bad=[(a,b,E.normalise(a)) for a,b in G["textvqa_normalised"] if E.normalise(a)!=b]
    assert not bad
    assert all(E.parse_yes_no(a)==b for a,b in G["mme_parsed"])
    for c in G["textvqa_soft_accuracy"]:
        assert E.soft_accuracy(c["prediction"], E.Question("", Path(), "", c["answers"]))==c["score"]
