"""Real FSDP2 on a CPU, for tests."""

from accelerate.state import AcceleratorState, DistributedType, PartialState


def install():
    """Let accelerate shard on CPUs; call it before accelerate's state is made.

    accelerate turns a distributed type into FSDP only where it is MULTI_GPU; on CPUs it stays MULTI_CPU, which is DDP,
    and nothing says so. So the state is called MULTI_GPU for the moment in which accelerate looks.
    """
    original = AcceleratorState.__init__

    def init_as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None and not AcceleratorState._shared_state:
            PartialState(kwargs.get("cpu", False))
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = init_as_on_gpus
