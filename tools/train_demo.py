"""Train the models that ship in the package, on the Python standard library's own source and on conversations made of it.

    python tools/train_demo.py --minutes 60 --continue             # one more stage of training for tpllm/demo
    python tools/train_demo.py --minutes 25 --model draft          # tpllm/demo_draft, from random weights and the demo's embedding
    python tools/train_demo.py --evaluate                          # measure tpllm/demo instead; --model draft --evaluate: the draft
"""
import argparse

from demo_training.evaluation import evaluate
from demo_training.models import MODELS
from demo_training.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo", help="which one (default: demo)")
    parser.add_argument("--minutes", type=float, default=60, help="budget of the training, in minutes")
    parser.add_argument("--continue", dest="is_continued", action="store_true", help="go on from the weights that are there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="measure the model that is there instead of training it")
    parser.add_argument("--windows", type=int, default=200, help="how many held-out windows of 1024 tokens to measure")
    parser.add_argument("--conversations", type=int, default=200, help="how many held-out conversations to measure")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}; give more than 0")
    if not arguments.evaluate:
        train(model, arguments.minutes, seed=arguments.seed, is_continued=arguments.is_continued)
    evaluate(model, num_windows=arguments.windows, num_conversations=arguments.conversations, seed=0)


if __name__ == "__main__":
    main()
