import os
import subprocess
import sys


def test_help_is_cheap_and_teaches():
    code = (
        "import sys; from crepe_llm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'llmcompressor'} & set(sys.modules)"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "crepe prune smollm2 --recipe crepe_2of4" in done.stdout
