"""How `init/*` in `train_*.npz` was obtained.

The recording of the reference's trainings kept references to its student's live arrays under `init/*`, so that they
hold the weights after the last step. The weights before the first are recovered from the final teacher alone: with
teacher and student equal at the start, T = S0 + sum_i c_i (S_i - S0), where S_i is the student after step i and the
small c_i follow from the momenta; S0 = T - sum_i c_i (S_i - S0) is a fixed point that a few rounds of training reach.
The recorded losses, gradient norms and final student weights take no part in it and remain as tests.

usage: python tests/golden/recover_initial_weights.py RECORDED.npz OUTPUT.npz   (from the repository root)
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_golden_training import arrays, config_of, train_steps


def main(recorded: str, output: str) -> None:
    golden = np.load(recorded)
    config = config_of(Path(recorded).stem)
    momenta = [golden[f"step{step}/hyper_lr_wd_mom_temp_lastlr"][2] for step in range(4)]
    teacher = {key: value.double() for key, value in arrays(golden, "final_teacher/").items()}
    initial = dict(teacher)
    for _ in range(6):
        students = [
            {key: value.double().clone() for key, value in step.meta_arch.student.state_dict().items()}
            for step in train_steps(golden, config, {key: value.float() for key, value in initial.items()})
        ]
        recovered = {}
        for key, value in initial.items():
            moved = torch.zeros_like(value)
            for momentum, student in zip(momenta, students, strict=True):
                moved = momentum * moved + (1 - momentum) * (student[key] - value)
            recovered[key] = teacher[key] - moved
        change = max((recovered[key] - initial[key]).abs().max().item() for key in initial)
        initial = recovered
        print(f"largest change {change:.2e}")
    saved = {key: golden[key] for key in golden if not key.startswith("init/")}
    np.savez_compressed(output, **saved, **{f"init/{key}": value.float().numpy() for key, value in initial.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
