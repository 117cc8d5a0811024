// Files are read here and sent as a data URL: nothing is uploaded to a file on the server.
const say = (text) => { element.querySelector('.arl-status').textContent = text; };
const send = (value, text) => { say(text); props.value = value; trigger('upload'); };
const read = (files) => {
    const file = files[0];
    if (!file) return;
    if (file.size > MAX_BYTES) {
        say(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB, above the limit of ${MAX_BYTES / 1e6} MB.`);
        return;
    }
    const reader = new FileReader();
    reader.onerror = () => say(`${file.name} could not be read: choose a file, not a folder.`);
    reader.onload = () => send(
        { name: file.name, data: reader.result }, files.length > 1 ? `One at a time: only ${file.name} is shown.` : '');
    reader.readAsDataURL(file);
};
const zone = () => element.querySelector('.arl-zone');
element.addEventListener('change', (event) => {
    if (event.target.type !== 'file') return;
    event.stopPropagation();
    read(event.target.files);
    event.target.value = ''; // so that the same file can be chosen again
});
element.addEventListener('click', (event) => {
    const example = event.target.closest('[data-example]');
    if (example) send({ example: example.dataset.example }, '');
});
for (const name of ['dragenter', 'dragover', 'dragleave', 'drop']) {
    element.addEventListener(name, (event) => {
        event.preventDefault();
        zone().classList.toggle('arl-over', name === 'dragenter' || name === 'dragover');
        if (name === 'drop') read(event.dataTransfer.files);
    });
}
document.addEventListener('paste', (event) => {
    if (event.clipboardData.files.length) read(event.clipboardData.files);
});
element.dataset.ready = '';
