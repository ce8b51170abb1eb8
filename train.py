"""Train a GPT: `python train.py` pretrains a small one; `python train.py --help` lists everything that can be set.

The folder `conf/` says what is trained and how, `llm_lightning/` does it.
"""

from pathlib import Path

from llm_lightning.cli.main import VERBS
from llm_lightning.experiments.launch import main

if __name__ == "__main__":
    main(Path(__file__).resolve(), VERBS)
