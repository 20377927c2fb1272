"""A browser that a test drives, by the few calls of WebDriver that the tests need.

https://www.w3.org/TR/webdriver2/ has the protocol: JSON over HTTP, which chromedriver serves.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'     # the key of an element, by the protocol
ENTER = '\ue007'


def find_programs():
    """(chromedriver, chromium): their paths, or None where one is not installed.

    The variables CHROMEDRIVER and CHROMIUM may name them.
    """
    driver = shutil.which(os.environ.get('CHROMEDRIVER', 'chromedriver'))
    browser = None
    for name in (os.environ.get('CHROMIUM'), 'chromium', 'chromium-browser', 'google-chrome'):
        browser = browser or shutil.which(name or '')
    return driver, browser


class Browser:
    """A headless Chromium with an empty profile."""

    def __init__(self, size='800,600'):
        driver, browser = find_programs()
        self.process = subprocess.Popen([driver, '--port=0'], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.session = None
        try:
            for line in self.process.stdout:
                match = re.search(r'started successfully on port (\d+)', line)
                if match:
                    break
            self.address = f'http://127.0.0.1:{match[1]}/session'
            arguments = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
                         '--disable-dev-shm-usage', f'--window-size={size}']
            options = {'binary': browser, 'args': arguments}
            capabilities = {'alwaysMatch': {'goog:chromeOptions': options,
                                            'goog:loggingPrefs': {'browser': 'ALL'}}}
            self.session = self.call('POST', '', capabilities=capabilities)['sessionId']
            self.address += f'/{self.session}'
        except BaseException:
            self.close()
            raise

    def call(self, method, path, **arguments):
        """The value that a call of WebDriver returns."""
        data = None
        if method == 'POST':
            data = json.dumps(arguments).encode()
        request = urllib.request.Request(self.address + path, data, method=method,
                                         headers={'Content-Type': 'application/json'})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)['value']
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)['value']['message']) from None

    def close(self):
        try:
            if self.session:
                self.call('DELETE', '')
        finally:
            self.process.terminate()
            self.process.wait(20)
            self.process.stdout.close()

    def open(self, url):
        self.call('POST', '/url', url=url)

    def reload(self):
        self.call('POST', '/refresh')

    def run(self, script, *arguments):
        """What a function with this body returns in the page."""
        return self.call('POST', '/execute/sync', script=script, args=list(arguments))

    def element(self, css):
        found = self.call('POST', '/element', using='css selector', value=css)
        return f'/element/{found[ELEMENT]}'

    def type(self, css, text):
        """Type into an element, key by key."""
        self.call('POST', f'{self.element(css)}/value', text=text)

    def click(self, css):
        self.call('POST', f'{self.element(css)}/click')

    def wait(self, script, seconds=30):
        """Wait until a function with this body returns something true in the page; return it."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f'not in {seconds} s: {script}'
            time.sleep(0.05)
        return value

    def new_tab(self):
        """Open a tab and go to it. Returns the tab before it, for go_to."""
        before = self.call('GET', '/window')
        self.go_to(self.call('POST', '/window/new', type='tab')['handle'])
        return before

    def go_to(self, tab):
        self.call('POST', '/window', handle=tab)

    def errors(self):
        """The messages of the page's console."""
        return [entry['message'] for entry in self.call('POST', '/se/log', type='browser')]

    def screenshot(self):
        """The page as a PNG."""
        return base64.b64decode(self.call('GET', '/screenshot'))
