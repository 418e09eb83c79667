"""Memory of a measured step beside that of a training step, with sharded weights (FSDP2).

    torchrun --nproc_per_node 2 examples/benchmarks/memory_in_shards.py
    torchrun --nproc_per_node 4 examples/benchmarks/memory_in_shards.py

Llamas of one width and growing depth on CPU processes; every allocation is counted (torch's profiler), on rank 0.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hf_flerm.engines import engine_of
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.rates.probe import RateProbe

MB = 1e6
REPEATS = 9  # the smallest counts: how many layers are gathered ahead depends on timing


def peak(run: Callable[[], object]) -> float:
    """Return the peak of the allocated bytes while something runs, minus the bytes allocated before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def sharded(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama whose layers are gathered one at a time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def row(width: int, layers: int) -> list[float]:
    """Layers, all weights, the snapshot, and what a training step and a measured one allocate, in MB."""
    model = sharded(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    batch = {"input_ids": torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))}
    parameters = trainable_parameters(model)
    weights = engine_of(model).master_weights(optimizer, parameters)
    probe = RateProbe(model)

    def train() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure() -> None:
        before = Snapshot(weights)
        train()
        with before.put_back(dict.fromkeys(parameters, 1e-3)) as updates:
            probe.measure(updates, [batch], torch.Generator().manual_seed(0))

    train()
    measure()  # the first one of a run also verifies its gates
    whole = sum(parameter.nbytes for parameter in parameters.values())
    snapshot = peak(lambda: Snapshot(weights))
    plain, measured = (min(peak(run) for _ in range(REPEATS)) for run in (train, measure))
    return [layers, whole / MB, snapshot / MB, plain / MB, measured / MB]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    rows = [row(options.width, layers) for layers in options.layers]
    if state.is_main_process:
        print("| processes | layers | all weights, MB | snapshot | training step | measured step | more than both |")
        print("|---|---|---|---|---|---|---|")
        for layers, whole, snapshot, plain, measured in rows:
            print(
                f"| {state.num_processes} | {layers:.0f} | {whole:.1f} | {snapshot:.1f} | {plain:.1f} | {measured:.1f} "
                f"| {max(measured - plain - snapshot, 0.0):.1f} |"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
