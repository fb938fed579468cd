"""The browser editor, `ddengine ui`. `page` wires it with Gradio; all else here is plain and tested without it."""
