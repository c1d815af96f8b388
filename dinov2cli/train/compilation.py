"""`train.compile`: blocks, heads, centering and losses through torch.compile, each by itself."""

from dinov2cli.train.ssl_meta_arch import SSLMetaArch


def compile_training(meta_arch: SSLMetaArch) -> None:
    """Compile every block and head of student and teacher, the centering and the losses, in place.

    Names of parameters stay as they are. Compiled one by one, equal blocks share one compiled graph, and sharding can
    still treat each for itself: call this before it is applied. The blocks' shapes are fixed by the configuration,
    except in the last block, the heads and the losses, where the number of masked patches differs from step to step:
    these are compiled for any number.
    """
    for network in (meta_arch.student, meta_arch.teacher):
        for block in network.backbone.blocks:
            block.compile()
        for head in [network.dino_head, *([network.ibot_head] if network.separate_head else [])]:
            head.compile()
    for part in (meta_arch.dino_centering, meta_arch.ibot_centering, meta_arch.dino_loss, meta_arch.ibot_patch_loss):
        part.compile()
