"""`hooked-vla serve`: a policy for other people's evaluation."""

import logging
from typing import Annotated

import typer
from rich.console import Console

from hooked_vla import registry
from hooked_vla.vla import HookedVLA

CLIENTS = {
    "openpi": "openpi_client.websocket_client_policy.WebsocketClientPolicy(host={host!r}, port={port})",
    "vla-eval": "vla-eval run -c CONFIG --server-url {url}",
}


def serve(
    model: Annotated[str, typer.Option(help="a checkpoint's folder or hub id, or a model's name with --size")],
    protocol: Annotated[str, typer.Option(help="openpi or vla-eval")] = "openpi",
    host: Annotated[str, typer.Option(help="whom to listen to; 0.0.0.0 for everybody")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one")] = 8000,
    cameras: Annotated[str | None, typer.Option(help="which camera of the clients stands for which of the policy's: "
                                                     "observation/image=agent,wrist_image=wrist")] = None,
    instruction: Annotated[str | None, typer.Option(help="for clients that send none")] = None,
    unnorm_key: Annotated[str | None, typer.Option(help="which statistics, for checkpoints with several sets")] = None,
    size: Annotated[str | None, typer.Option(help="tiny or full: random weights, for a model's name")] = None,
    device: Annotated[str, typer.Option(help="where the model runs")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the weights")] = "float32",
    max_batch_size: Annotated[int, typer.Option(help="vla-eval: clients that one forward pass may answer")] = 1,
    api_key: Annotated[str | None, typer.Option(envvar="HOOKED_VLA_API_KEY", help="that clients must send")] = None,
) -> None:  # fmt: skip
    """Serve a policy over a websocket until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        from hooked_vla.serving.server import RunningServer
        from hooked_vla.serving.server import serve as run_server

        settings = {"cameras": read_camera_map(cameras), "instruction": instruction, "unnorm_key": unnorm_key}
        policy = _load(model, size, device, dtype)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error

    def announce(server: RunningServer) -> None:
        console = Console()
        console.print(f"{policy.spec.name} speaks {protocol} at [bold]{server.url}[/bold]", highlight=False)
        client = CLIENTS[protocol].format(host=server.host, port=server.port, url=server.url)
        console.print(f"client: {client}", highlight=False, markup=False)

    try:
        run_server(
            policy, protocol, host, port, on_start=announce, max_batch_size=max_batch_size, api_key=api_key, **settings
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on {host}:{port}: {error}") from error


def read_camera_map(text: str | None) -> dict[str, str]:
    """ "CLIENT=POLICY,CLIENT=POLICY" as a map.

    Raises ValueError for anything else.
    """
    pairs = [] if text is None else [pair.partition("=") for pair in text.split(",")]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ValueError(f"cameras are CLIENT=POLICY, such as observation/image=agent; got {wrong}")
    return {client: policy for client, _, policy in pairs}


def _load(name: str, size: str | None, device: str, dtype: str) -> HookedVLA:
    if size is not None:
        return HookedVLA.from_spec(name, size, device=device, dtype=dtype)
    if name in registry.list_models():
        raise ValueError(f"{name!r} names a model without weights: give a checkpoint, or --size for random ones")
    return HookedVLA.from_pretrained(name, device=device, dtype=dtype)
