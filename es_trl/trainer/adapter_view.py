"""AdapterView: what `transformers.Trainer` sees as the model, namely the adapter's parameters and nothing else."""

from torch import nn


class AdapterView(nn.Module):
    """
    Registers the adapter's parameters (the very objects, not copies), so that Accelerate, the optimizer and the
    gradient norm touch only what is trained and never the frozen pipeline.

    Args:
        theta (`dict[str, nn.Parameter]`): The adapter matrices by name.
    """

    accepts_loss_kwargs = False

    def __init__(self, theta: dict[str, nn.Parameter]):
        super().__init__()
        for name, parameter in theta.items():
            self.register_parameter(name.replace(".", "/"), parameter)  # dots are not allowed in parameter names

    def forward(self):
        """There is no forward pass here: the pipeline draws."""
        raise RuntimeError("AdapterView only holds the adapter's parameters; images are drawn by the pipeline.")
