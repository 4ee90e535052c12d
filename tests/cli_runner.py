"The commands, called in this process."
from typer.testing import CliRunner
from libmoe_nb import cli

def libmoe(*args, code=0):
    "What a command prints: its output where it ends well, else its errors"
    r = CliRunner().invoke(cli.app, [str(a) for a in args], prog_name='libmoe')
    assert (r.exit_code, r.exception if r.exit_code not in (0, 2) else None) == (code, None), r.output
    return r.stderr if code else r.stdout
