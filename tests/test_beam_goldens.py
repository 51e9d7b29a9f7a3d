"""Beam search against transformers', on tiny random checkpoints: the same hypotheses, the same scores.

Oracle: transformers' `generate` with `early_stopping="never"` in float32 (tests/goldens/beams.json).
"""

import json
from pathlib import Path

import pytest
from tiny_llm.beam_search import BeamSearchParams
from tiny_llm.engine_core import EngineCore

from tiny_checkpoints import CONFIGS, random_weights, write_folder
from tiny_llm import LLM

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "beams.json").read_text())
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted({search["checkpoint"] for search in GOLDENS["searches"]}))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LLM]:
    name = request.param
    path = write_folder(tmp_path_factory.mktemp(name), CONFIGS[name], random_weights(CONFIGS[name]))
    return name, LLM(path, kv_cache_dtype="float32", num_blocks=64, block_size=4, max_num_seqs=8)


def test_hypotheses_and_scores_match_transformers(checkpoint: tuple[str, LLM]) -> None:
    name, llm = checkpoint
    golden = [search for search in GOLDENS["searches"] if search["checkpoint"] == name]
    assert any(len(found["tokens"]) < GOLDENS["new_tokens"] for search in golden for found in search["found"])
    for index, wanted in enumerate(golden):
        eos = () if wanted["eos"] is None else (wanted["eos"],)
        core = EngineCore(llm.core.manager, eos)
        params = BeamSearchParams(
            beam_width=wanted["width"], max_tokens=GOLDENS["new_tokens"], length_penalty=wanted["penalty"]
        )
        search = core.add_beam_search(str(index), wanted["prompt"], params)
        while search.beams:
            core.step()
        assert [list(ended.hypothesis.tokens) for ended in search.ended] == [
            found["tokens"] for found in wanted["found"]
        ], wanted
        assert [ended.score for ended in search.ended] == pytest.approx(
            [found["score"] for found in wanted["found"]], abs=TOLERANCE
        )


def test_a_search_of_width_one_is_greedy(checkpoint: tuple[str, LLM]) -> None:
    _, llm = checkpoint
    prompt = GOLDENS["searches"][0]["prompt"]
    [found] = llm.beam_search(prompt, BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    tokens, logprob = [], 0.0
    for _ in range(8):
        row = llm.logits([*prompt, *tokens])[-1]
        chosen = int(row.argmax())
        logprob += float(row[chosen] - row.logsumexp())
        tokens.append(chosen)
    assert list(found.sequences[0].tokens) == [*prompt, *tokens]
    assert found.sequences[0].cum_logprob == pytest.approx(logprob, abs=TOLERANCE)
