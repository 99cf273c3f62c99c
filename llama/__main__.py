from llama.cli import main

main()
