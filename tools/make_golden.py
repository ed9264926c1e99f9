"""Write tests/golden: what ``transformers`` answers for tiny models of every family, for tests that run without torch.

    pip install -e .[test,oracle] && python tools/make_golden.py

A file holds config.json, the seed of the weights (tests/support/tiny_models.py makes them from it) and their checksum, the prompt, the logits of a
few of its positions and 64 greedy tokens. The seed is the first at which the tokens decide something; see tests/support/transformers_oracle.py.
"""
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import tiny_models  # noqa: E402
import transformers_oracle  # noqa: E402


def main() -> None:
    """Write one file for each model of ``tiny_models.GOLDEN``."""
    tiny_models.GOLDEN_FOLDER.mkdir(exist_ok=True)
    for model in tiny_models.GOLDEN:
        model, reference = transformers_oracle.first_clear_seed(model)
        positions = [0, model.prompt_len // 2, model.prompt_len - 1]
        np.savez_compressed(
            tiny_models.GOLDEN_FOLDER / f"{model.name}.npz", config_json=json.dumps(dict(model.hf)), seed=model.seed, checksum=model.checksum(),
            prompt=np.array(model.prompt(), np.int32), positions=np.array(positions, np.int32), logits=reference.logits[positions],
            tokens=np.array(reference.tokens, np.int32))
        print(f"{model.name}: seed {model.seed}, least gap {reference.gap:.4f}, {len(set(reference.tokens))} distinct tokens")


if __name__ == "__main__":
    main()
