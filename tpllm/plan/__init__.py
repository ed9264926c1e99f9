"""What a model takes and how fast it can be on devices that need not be there: ``tpllm plan``."""
from tpllm.plan.devices import prepare_environment
from tpllm.plan.planner import make_plan
from tpllm.plan.search import find_meshes, plan_best
from tpllm.plan.setup import PlanOptions

__all__ = ["PlanOptions", "find_meshes", "make_plan", "plan_best", "prepare_environment"]
