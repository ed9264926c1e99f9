"""``tpllm run`` on the fake engine, for tests that kill the process."""
import sys

from tests.jobs.fake_llm import FakeLLM
from tpllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], make_llm=FakeLLM))
